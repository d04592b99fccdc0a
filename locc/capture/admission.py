"""The admission test: a captured graph runs beside the model, and whatever differs refuses it.

The same runs of the graph yield the metadata of its nodes: specs, mutations, random draws.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc.capture.batch import merge
from locc.capture.eager import Eager, Run, eager_run
from locc.capture.graphs import Trace
from locc.capture.state import random_state, same_state
from locc.capture.tree import flatten, leaves_of, spell
from locc.errors import CaptureError
from locc.ir.captured import Root, strip
from locc.ir.spec import TensorSpec

_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class _Seen:
    values: dict[fx.Node, Any] = field(default_factory=dict)
    mutates: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    random: set[fx.Node] = field(default_factory=set)
    stateless: set[fx.Node] = field(default_factory=set)


class _Watching(fx.Interpreter):
    """Runs a graph and notes the shape of each value, what each node changes and whether it draws."""

    def __init__(self, root: Root, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.seen = _Seen()
        self._tensors: list[tuple[fx.Node, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
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
    """Return a nested value with each tensor replaced by (shape, dtype)."""
    if isinstance(value, Tensor):
        return _Look(tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_look(v) for v in value)
    _, structure = flatten(value)
    if structure.branches is None:
        return None
    return {key: _look(_part(value, kind, key)) for kind, key in structure.steps}


def _part(value: Any, kind: str, key: Any) -> Any:
    return getattr(value, key) if kind == "attr" else value[key]


@dataclass(frozen=True)
class _Look:
    shape: tuple[int, ...]
    dtype: torch.dtype


def admit(
    root: Root, trace: Trace, eager: Eager, training: bool, batches: list[int | None], pure: bool
) -> None:
    """Compare a trace with eager at each batch size and annotate its nodes.

    Raises:
        CaptureError: something differs; the message names the first tensor that does.
    """
    seen = [compare(root, trace, eager, training, batch) for batch in batches]
    if pure:
        _require_pure(seen[0])
    _annotate(trace.graph, seen, batches)


def compare(root: Root, trace: Trace, eager: Eager, training: bool, batch: int | None) -> _Seen:
    """Run a trace beside eager at one batch size and return what its nodes did.

    Raises:
        CaptureError: something differs; the message names the first tensor that does.
    """
    real = eager_run(eager, training, batch)
    watching = _Watching(root, trace.graph)
    run = _run(watching, eager, training, batch)
    _compare(real, run, training, batch)
    return watching.seen


def _run(watching: _Watching, eager: Eager, training: bool, batch: int | None) -> Run:
    def forward(tensors: list[Tensor]) -> Any:
        watching.seen, watching._tensors = _Seen(), []
        return watching.run(*tensors)

    try:
        return eager.measure(forward, training, batch)
    except Exception as error:
        raise CaptureError(
            f"the captured graph fails where the model does not (batch of {batch}): {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _compare(real: Run, run: Run, training: bool, batch: int | None) -> None:
    mode = "train" if training else "eval"
    where = f"in {mode} mode at a batch of {batch}"
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
    for name, gradient in real.gradients.items():
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


def _require_pure(seen: _Seen) -> None:
    for node, changed in seen.mutates.items():
        if node.op != "call_module":
            raise CaptureError(f"'{node.name}' changes '{changed[0].name}' in place")
    for node, value in seen.values.items():
        if node.op in ("call_function", "call_method") and _holds_no_tensor(value):
            raise CaptureError(f"'{node.name}' is no tensor: shape arithmetic")
        if node.op in ("call_function", "call_method") and _data_dependent(node, seen):
            raise CaptureError(f"the shape of '{node.name}' depends on data")


def _data_dependent(node: fx.Node, seen: _Seen) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        looks = [seen.values[i] for i in index if isinstance(i, fx.Node)]
        return any(isinstance(look, _Look) and look.dtype == torch.bool for look in looks)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive")


def _holds_no_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return all(_holds_no_tensor(part) for part in value)
    return not isinstance(value, _Look)


def _annotate(graph: fx.Graph, seen: list[_Seen], batches: list[int | None]) -> None:
    for node in graph.nodes:
        looks = [run.values[node] for run in seen]
        node.meta.setdefault("stack", ())
        node.meta["spec"] = _spec(looks, batches, node)
        if node in seen[0].mutates:
            node.meta["mutates"] = seen[0].mutates[node]
        if node in seen[0].stateless:
            node.meta["stateful"] = False
        if node in seen[0].random:
            node.meta["random"] = True


def _spec(looks: list[Any], batches: list[int | None], node: fx.Node) -> Any:
    first = looks[0]
    if isinstance(first, dict):
        return {key: _spec([look[key] for look in looks], batches, node) for key in first}
    if isinstance(first, tuple):
        return tuple(_spec([look[i] for look in looks], batches, node) for i in range(len(first)))
    if not isinstance(first, _Look):
        return None
    if len(looks) > 1 and batches[0] is not None and batches[1] is not None:
        dims = merge(first.shape, looks[1].shape, (batches[0], batches[1]))
        if dims is None:
            raise CaptureError(
                f"the value '{node.name}' has shapes {list(first.shape)} and {list(looks[1].shape)} for "
                f"batches of {batches[0]} and {batches[1]}, which is no fixed multiple of the batch size"
            )
        return TensorSpec(dims, first.dtype)
    batch = batches[0] if node.op != "get_attr" else None
    return TensorSpec(tuple(_leading(first.shape, batch)), first.dtype)


def _leading(shape: tuple[int, ...], batch: int | None) -> list[Any]:
    # one batch size is all there is to go by: a first dimension of that size counts as the batch
    like = TensorSpec.of(torch.empty(shape, device="meta"), batch)
    return list(like.shape)
