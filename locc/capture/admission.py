"""The admission test: a captured graph runs beside the model, and whatever differs refuses it.

The same runs of the graph yield the metadata of its nodes: specs, mutations, random draws.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.capture.eager import Eager, Run, eager_run
from locc.capture.graphs import Trace
from locc.capture.state import random_state, same_state
from locc.capture.targets import InRegion
from locc.capture.tree import flatten, leaves_of, spell
from locc.errors import CaptureError
from locc.ir.calls import Interpreter
from locc.ir.captured import Root, strip
from locc.ir.spec import BatchDim, Point, TensorSpec, fit

_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class Seen:
    """What the nodes of a graph did in one run."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    mutates: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    random: set[fx.Node] = field(default_factory=set)
    stateless: set[fx.Node] = field(default_factory=set)


class _Watching(Interpreter):
    """Runs a graph and notes the shape of each value, what each node changes and whether it draws."""

    def __init__(self, root: Root, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.seen = Seen()
        self.at: fx.Node | None = None
        self._tensors: list[tuple[fx.Node, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        versions = [t._version for _, t in self._tensors]
        drawn = random_state()
        state = [(a, self.env[a].clone()) for a in n.all_input_nodes if _is_buffer(a, self.env[a])]
        held = self._held(n)
        value = super().run_node(n)
        if held is not None and all(now is old and torch.equal(now, was) for now, old, was in held()):
            self.seen.stateless.add(n)
        if not same_state(drawn, random_state()):
            self.seen.random.add(n)
        if n.op not in ("placeholder", "get_attr", "output"):
            changed = [node for (node, t), v in zip(self._tensors, versions, strict=True) if t._version != v]
            # F.batch_norm writes its statistics without a new version
            changed += [a for a, old in state if not torch.equal(old, self.env[a])]
            if changed:
                self.seen.mutates[n] = tuple(dict.fromkeys(changed))
        self._tensors += [(n, v) for v in leaves_of(value) if isinstance(v, Tensor) and not v.is_inference()]
        self.seen.values[n] = _look(value)
        return value

    def _held(self, n: fx.Node) -> Callable[[], list[tuple[Tensor, Tensor, Tensor]]] | None:
        """Note the buffers of a leaf without parameters: one that leaves them alone may run twice."""
        if n.op != "call_module":
            return None
        leaf = self.fetch_attr(str(n.target))
        if any(True for _ in leaf.parameters()):
            return None
        before = [(name, buffer, buffer.clone()) for name, buffer in leaf.named_buffers()]

        def compare() -> list[tuple[Tensor, Tensor, Tensor]]:
            after = dict(leaf.named_buffers())
            return [(after[name], buffer, value) for name, buffer, value in before]

        return compare


def _is_buffer(node: fx.Node, value: Any) -> bool:
    return node.op == "get_attr" and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _look(value: Any) -> Any:
    """Return a nested value with each tensor replaced by what is asked of it."""
    if isinstance(value, Tensor):
        return Look(tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, (tuple, list)):
        return tuple(_look(v) for v in value)
    _, structure = flatten(value)
    if structure.branches is None:
        return None
    return {key: _look(_part(value, kind, key)) for kind, key in structure.steps}


def _part(value: Any, kind: str, key: Any) -> Any:
    return getattr(value, key) if kind == "attr" else value[key]


@dataclass(frozen=True)
class Look:
    """What is asked of a tensor that a node returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool


def admit(
    root: Root, trace: Trace, eager: Eager, training: bool, points: list[Point], origin: str
) -> dict[Point, Seen]:
    """Compare a trace with eager at each point and annotate its nodes.

    Outputs and buffers are compared at every point, gradients at the first, and at the others where the
    graph holds something whose backward pass may know a size that its forward does not show.

    Returns:
        What the nodes did at each point.

    Raises:
        CaptureError: something differs; the message names the first tensor that does.
    """
    first, *others = points
    seen = {first: compare(root, trace, eager, training, first)}
    trace.whole = origin == "export" or any(_knows_sizes(node, seen[first]) for node in trace.graph.nodes)
    seen |= {point: compare(root, trace, eager, training, point, trace.whole) for point in others}
    if origin == "fx":
        _require_pure(seen[first])
    _annotate(trace, seen, eager)
    if training:
        _mark_constants(trace.graph, seen[first])
    return seen


def admit_known(
    root: Root, trace: Trace, eager: Eager, training: bool, looks: dict[Point, list[Any]], origin: str
) -> None:
    """Admit a trace that has been admitted before, with what its nodes returned at each point.

    Raises:
        CaptureError: an output or a buffer differs at the first point, or what a node returns does.
    """
    first, *others = looks
    seen = {first: compare(root, trace, eager, training, first, backward=False)}
    if [_shapes(seen[first].values[n]) for n in trace.graph.nodes] != [_shapes(v) for v in looks[first]]:
        raise CaptureError("a value has another shape than it had")
    seen |= {point: Seen(dict(zip(trace.graph.nodes, looks[point], strict=True))) for point in others}
    if origin == "fx":
        _require_pure(seen[first])
    _annotate(trace, seen, eager)
    if training:
        _mark_constants(trace.graph, seen[first])


def admit_in_eval(root: Root, trace: Trace, eager: Eager, trained: dict[Point, Seen], origin: str) -> None:
    """Admit a copy of a training trace for inference, where the opened code does not know the mode.

    Then only the closed modules can differ, so one size is enough: at others the graph has been compared
    in train mode.

    Raises:
        CaptureError: something differs from eager, or a value has another shape than in train mode.
    """
    point, train = next(iter(trained.items()))
    seen = compare(root, trace, eager, False, point)
    twins = dict(zip(trace.graph.nodes, train.values, strict=True))
    for node, twin in twins.items():
        if _shapes(seen.values[node]) != _shapes(train.values[twin]):
            raise CaptureError(f"'{node.name}' has another shape than in train mode")
    if origin == "fx":
        _require_pure(seen)
    others = {p: Seen({n: run.values[t] for n, t in twins.items()}) for p, run in trained.items()}
    _annotate(trace, {**others, point: seen}, eager)


def compare(
    root: Root, trace: Trace, eager: Eager, training: bool, point: Point, backward: bool = True
) -> Seen:
    """Run a trace beside eager at one point and return what its nodes did.

    Raises:
        CaptureError: something differs; the message names the first tensor that does.
    """
    real = eager_run(eager, training, point, backward)
    watching = _Watching(root, trace.graph)
    run = _run(watching, eager, training, point, backward)
    _compare(real, run, training, eager.call.text(point), backward)
    return watching.seen


def _run(watching: _Watching, eager: Eager, training: bool, point: Point, backward: bool) -> Run:
    def forward(tensors: list[Tensor]) -> Any:
        watching.seen, watching._tensors = Seen(), []
        return watching.run(*tensors)

    try:
        return eager.measure(forward, training, point, backward)
    except Exception as error:
        raise CaptureError(
            f"the captured graph fails where the model does not ({eager.call.text(point)}): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            f"{_kept_in(watching)}"
        ) from error


def _kept_in(watching: _Watching) -> str:
    """Say, to end a sentence, which open module could keep inside what the graph was at."""
    node = watching.at
    for path, _ in node.meta.get("stack", ()) if node is not None else ():
        runs = not isinstance(watching.fetch_attr(path), (nn.Sequential, nn.ModuleList))
        if runs and node is not None and path not in ("model", node.target):
            name = strip(path)
            return (
                f"; '{name}' can keep it inside if no split lies within '{name}' (a split at '{name}' itself "
                "may) and the method does not look into each layer"
            )
    return ""


def _compare(real: Run, run: Run, training: bool, sizes: str, backward: bool) -> None:
    mode = "train" if training else "eval"
    where = f"in {mode} mode at {sizes}"
    paths = [
        spell(path) for path, value in zip(real.structure.paths(), real.outputs, strict=True)
        if isinstance(value, Tensor)
    ]  # fmt: skip
    outputs = [v for v in real.outputs if isinstance(v, Tensor)]
    for name, one, other in zip(paths, outputs, run.outputs, strict=True):
        _require(f"output '{name}'" if name else "the output", one, other, where)
    if real.loss is not None:
        _require("a random projection of the output", real.loss, run.loss, where)
    scale = max(
        (float(g.abs().max()) for g in real.gradients.values() if g is not None and g.numel()), default=0.0
    )
    for name, gradient in real.gradients.items() if backward else ():
        _require(f"the gradient of {name}", gradient, run.gradients.get(name), where, 1e-3 * scale)
    for name, buffer in real.buffers.items():
        _require(f"buffer '{strip(name)}' after the step", buffer, run.buffers.get(name), where)


def _require(name: str, real: Tensor | None, found: Any, where: str, floor: float = 0.0) -> None:
    if real is None and found is None:
        return
    real = torch.zeros_like(found) if real is None else real  # no gradient and a zero one say the same
    if found is None:
        found = torch.zeros_like(real)
    if not isinstance(found, Tensor) or found.shape != real.shape or found.dtype != real.dtype:
        shown = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise CaptureError(
            f"{name} differs from eager {where}: {shown} instead of {list(real.shape)} {real.dtype}"
        )
    difference, allowed = _distance(real, found, floor)
    if not difference <= allowed:
        raise CaptureError(
            f"{name} differs from eager {where}: by {difference:.2e}, where {allowed:.2e} would be rounding"
        )


def _distance(real: Tensor, found: Tensor, floor: float) -> tuple[float, float]:
    if real.numel() == 0 or torch.equal(real, found):
        return 0.0, 0.0
    if not (real.is_floating_point() or real.is_complex()):
        return float((real != found).sum()), 0.0
    wide = torch.complex128 if real.is_complex() else torch.float64
    one, other = real.detach().to(wide), found.detach().to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, torch.zeros_like(one), one - other).abs().max()
    finite = one.abs()[one.isfinite()]
    scale = max(float(finite.max()) if finite.numel() else 0.0, floor, 1e-12)
    return float(gap), _TOLERANCE.get(real.dtype, 1e-4) * scale


def _require_pure(seen: Seen) -> None:
    for node, changed in seen.mutates.items():
        if node.op != "call_module":
            raise CaptureError(f"'{node.name}' changes '{changed[0].name}' in place")
    for node, value in seen.values.items():
        whole = any(n.op != "output" and n.target not in (operator.getitem, getattr) for n in node.users)
        if node.op == "call_module" and isinstance(value, (tuple, dict)) and whole:
            raise CaptureError(
                f"'{node.name}' hands on several values as one, and only tensors can cross a cut"
            )
        if node.op in ("call_function", "call_method") and _holds_no_tensor(value):
            raise CaptureError(f"'{node.name}' is no tensor: shape arithmetic")
        if node.op in ("call_function", "call_method") and _data_dependent(node, seen):
            raise CaptureError(f"the shape of '{node.name}' depends on data")


def _knows_sizes(node: fx.Node, seen: Seen) -> bool:
    """Whether the backward pass of a node may use a size that a constant, a closure or an argument holds.

    An operator of PyTorch differentiates what its forward computes; a hook, a custom function and a module
    that is told a size may do otherwise.
    """
    if node.op == "call_module":
        return any(_holds_no_tensor(seen.values[given]) for given in node.all_input_nodes)
    if node.op == "call_method":
        return node.target == "register_hook"
    target = node.target.function if isinstance(node.target, InRegion) else node.target
    return node.op == "call_function" and not _plain(target)


def _plain(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    if inspect.isbuiltin(function) or inspect.ismethoddescriptor(function):
        return True
    return module in ("locc.markers", "locc.ir.ops") or module.partition(".")[0] in (
        "torch",
        "_operator",
        "operator",
    )


def _shapes(look: Any) -> Any:
    if isinstance(look, dict):
        return {key: _shapes(part) for key, part in look.items()}
    if isinstance(look, tuple):
        return tuple(_shapes(part) for part in look)
    return (look.shape, look.dtype) if isinstance(look, Look) else None


def _data_dependent(node: fx.Node, seen: Seen) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        looks = [seen.values[i] for i in index if isinstance(i, fx.Node)]
        return any(isinstance(look, Look) and look.dtype == torch.bool for look in looks)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive")


def _holds_no_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return all(_holds_no_tensor(part) for part in value)
    return not isinstance(value, Look)


def _annotate(trace: Trace, seen: dict[Point, Seen], eager: Eager) -> None:
    first = next(iter(seen.values()))
    trace.looks = {point: [run.values[node] for node in trace.graph.nodes] for point, run in seen.items()}
    for node in trace.graph.nodes:
        looks = {point: run.values[node] for point, run in seen.items()}
        node.meta.setdefault("stack", ())
        node.meta["spec"] = _spec(looks, node, eager)
        if node in first.mutates:
            node.meta["mutates"] = first.mutates[node]
        if node in first.stateless:
            node.meta["stateful"] = False
        if node in first.random:
            node.meta["random"] = True


def _mark_constants(graph: fx.Graph, seen: Seen) -> None:
    """Note values that could carry a gradient and do not: made under no_grad, or of frozen parameters."""
    for node in graph.nodes:
        look = seen.values[node]
        if isinstance(look, Look) and not look.grad and node.op not in ("placeholder", "get_attr"):
            node.meta["constant"] = True


def _spec(looks: dict[Point, Any], node: fx.Node, eager: Eager) -> Any:
    point, first = next(iter(looks.items()))
    if isinstance(first, dict):
        return {key: _spec({p: v[key] for p, v in looks.items()}, node, eager) for key in first}
    if isinstance(first, tuple):
        return tuple(_spec({p: v[i] for p, v in looks.items()}, node, eager) for i in range(len(first)))
    if not isinstance(first, Look):
        return None
    dims = fit({p: look.shape for p, look in looks.items()}, eager.call.dims)
    if dims is None:
        shapes = " and ".join(str(list(look.shape)) for look in looks.values())
        points = " and ".join(eager.call.text(p) for p in looks)
        raise CaptureError(
            f"the value '{node.name}' has shapes {shapes} for {points}, which is no fixed multiple of the "
            "batch size"
        )
    single = all(p.batch == point.batch for p in looks) and node.op != "get_attr"
    if single and dims and dims[0] == point.batch:
        dims = (BatchDim(), *dims[1:])  # one batch size is all there is to go by
    return TensorSpec(dims, first.dtype)
