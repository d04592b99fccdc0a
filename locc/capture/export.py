"""The third mechanism: `torch.export` sees through code that neither proxies nor a recorder can open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from locc.capture.batch import Call
from locc.capture.eager import Eager
from locc.capture.graphs import Trace, placeholder_name
from locc.capture.targets import Constant
from locc.errors import CaptureError, LoccError
from locc.ir.captured import Inputs, Root, SizeGuard, owned_tensor
from locc.ir.spec import BatchDim, Point, TensorSpec
from locc.quiet import quiet
from locc.snapshot import preserved


def trace(root: Root, call: Call, training: bool, eager: Eager, points: list[Point]) -> Trace:
    """Export the whole model with dynamic sizes, and keep the module stack of every op.

    Raises:
        CaptureError: the model cannot be exported.
    """
    tensors = call.at(points[0])
    inputs = call.inputs(tensors)
    batched = any(point.batch != points[0].batch for point in points)
    with preserved(root), torch.enable_grad(), quiet("torch"):  # a refused export logs its whole graph
        root.train(training)
        try:
            program = _export(root, call, tensors, inputs, batched)
            module = program.module()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error
    order = _order(program, tensors, inputs)
    graph = _Copy(root, module).copy(call, order)
    wanted = sum(isinstance(v, Tensor) for v in eager.run(training, points[0]).outputs)
    found = len(graph.output_node().args[0])  # type: ignore[arg-type]
    if found != wanted:
        raise CaptureError(f"the exported graph has {found} tensor outputs, and eager has {wanted}")
    return Trace(graph, _guards(module, call, order) if len(points) > 1 else [])


def _export(root: Root, call: Call, tensors: list[Tensor], inputs: Inputs, batched: bool) -> Any:
    shapes = torch.export.ShapesCollection()
    varies = False
    for i, tensor in enumerate(tensors):
        dims = [*([0] if batched and call.batched[i] else []), *call.free[i]]
        if dims:
            shapes[tensor] = dict.fromkeys(dims, torch.export.Dim.AUTO)
            varies = True
    flags = shapes.dynamic_shapes(root.model, inputs.args, inputs.kwargs) if varies else None
    return torch.export.export(root.model, inputs.args, inputs.kwargs, dynamic_shapes=flags, strict=True)


def _order(program: Any, tensors: list[Tensor], inputs: Inputs) -> list[int | None]:
    """Return, for each placeholder of the program, which of the call's tensors it is."""
    keywords = program.call_spec.in_spec.children()[1].context
    leaves = pytree.tree_leaves((inputs.args, {key: inputs.kwargs[key] for key in keywords}))
    index = {id(t): i for i, t in enumerate(tensors)}
    return [index.get(id(leaf)) for leaf in leaves]


class _Copy:
    """Copies an exported graph: placeholders in the call's order, tensors under the user's names."""

    def __init__(self, root: Root, module: fx.GraphModule) -> None:
        self.root, self.module = root, module
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.paths = {id(m): path for path, m in root.named_modules()}
        self.names = {id(t): n for n, t in (*root.named_parameters(), *root.named_buffers())}

    def copy(self, call: Call, order: list[int | None]) -> fx.Graph:
        """Return the copy."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for index, name in enumerate(call.names):
            node = self.graph.placeholder(placeholder_name(name))
            if index in order:
                self.made[placeholders[order.index(index)]] = node
        for node in self.module.graph.nodes:
            self._node(node)
        for node in self.graph.nodes:
            if (
                not node.meta.setdefault("stack", ()) and node.users
            ):  # a parameter belongs where it is used first
                node.meta["stack"] = next(iter(node.users)).meta["stack"] if node.op == "get_attr" else ()
        self.graph.lint()
        return self.graph

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder" or node.target == "_guards_fn":
            return
        if node.op == "output":
            flat = [value for value in pytree.tree_leaves(node.args[0]) if isinstance(value, fx.Node)]
            self.graph.output(tuple(self.made[value] for value in flat)).meta["stack"] = ()
            return
        if node.op == "get_attr":
            made = self._attribute(str(node.target))
        elif "_vmap_" in str(node.target) or "functorch" in str(node.target):
            raise CaptureError("a torch.func transform, which the exported graph spreads over several ops")
        else:
            made = self.graph.node_copy(node, lambda n: self.made[n])
        self.made[node] = made
        made.meta = {"stack": self._stack(node)}
        trace = [line for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
        places = [line.split('"') for line in trace if line.lstrip().startswith("File")]
        if places:
            file, rest = places[-1][1], places[-1][2]
            made.meta["line"] = f"{file}:{rest.split(',')[1].strip().removeprefix('line ')}"

    def _attribute(self, target: str) -> fx.Node:
        try:
            found = owned_tensor(self.root, f"model.{target}")
        except LoccError:
            found = None
        if isinstance(found, Tensor):
            return self.graph.get_attr(self.names.get(id(found), f"model.{target}"))
        value: Any = self.module
        for atom in target.split("."):
            value = getattr(value, atom)
        return self.graph.call_function(Constant(value))

    def _stack(self, node: fx.Node) -> tuple[tuple[str, int], ...]:
        calls = []
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            number = str(key).partition("@")[2]
            module = self.modules.get(f"model.{path}" if path else "model")
            if module is not None:  # the exporter also names a helper of its own
                calls.append((self.paths[id(module)], int(number) if number.isdigit() else 0))
        return tuple(calls)


def _guards(module: fx.GraphModule, call: Call, order: list[int | None]) -> list[SizeGuard]:
    check: Callable[..., Any] | None = getattr(module, "_guards_fn", None)
    specs = call.specs
    names = frozenset([*(["B"] if any(call.batched) else []), *(dim.name for dim in call.dims)])

    def holds(sizes: Mapping[str, int]) -> bool:
        if any(sizes[name] < 2 for name in names):
            return False  # an exported dynamic dimension starts at two
        try:
            if check is not None:
                check(*(None if i is None else _meta(specs[i], sizes) for i in order))
        except Exception:
            return False
        return True

    fixed = _fixed(module, specs, order)
    if not fixed:
        return [SizeGuard("the conditions of torch.export", holds, names)]
    return [_pinned(name, size) for name, size in fixed.items()]


def _meta(spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    return torch.empty(spec.named(sizes), dtype=spec.dtype, device="meta")


def _pinned(name: str, size: int) -> SizeGuard:
    text = f"{name} == {size}, by torch.export"
    return SizeGuard(text, lambda sizes: sizes[name] == size, frozenset({name}))


def _fixed(module: fx.GraphModule, specs: tuple[TensorSpec, ...], order: list[int | None]) -> dict[str, int]:
    """Return the dimensions that the export has made constants, by name."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = {}
    for node, i in zip(placeholders, order, strict=True):
        pairs = zip(node.meta["val"].shape, specs[i].shape, strict=True) if i is not None else ()
        for size, dim in pairs:
            if isinstance(size, int) and not isinstance(dim, int):
                found["B" if isinstance(dim, BatchDim) else dim.name] = size
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
