"""Crossings: which values modules send, and what comes back for those that are no activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from locc.ir import BatchDim, Boundary, TensorSpec, TrainingGraph, node_parameters, strip
from locc.rewrite.chain import handed_down
from locc.rewrite.objectives import add_all
from locc.rewrite.passes import Pass


def activations(ir: TrainingGraph, owner: str) -> list[fx.Node]:
    """Return the differentiable values that a module sends and that have a row for each sample.

    Left out are borrowed parameters and values computed from parameters alone (a table of position biases).
    """
    return [value for value in ir.crossing(owner) if has_rows(value)]


def has_rows(value: fx.Node) -> bool:
    """Whether a value that crosses a cut, or its entry, has a dimension that grows with the batch.

    A borrowed parameter has none, nor has a value that is computed from parameters alone.
    """
    return value.op != "get_attr" and value.meta["spec"].batch_dim is not None


def rows(value: fx.Node) -> int:
    """Return the dimension of a value in which its rows are; the value must have them, see `has_rows`."""
    dim = value.meta["spec"].batch_dim
    assert isinstance(dim, int)
    return dim


def in_blocks(ir: TrainingGraph, value: fx.Node) -> str | None:
    """Say why what belongs to a sample cannot be read off a value of several rows a sample, if it cannot.

    Whoever compares it with an output of one row a sample takes rows that follow each other for one sample's,
    as `x.flatten(0, 1)` leaves them. `torch.cat([a, b])` puts all samples of `b` behind those of `a`.
    """
    if all(_rows_a_sample(task.value) == _rows_a_sample(value) for task in ir.tasks):
        return None
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        named = getattr(node.target, "__name__", node.target) in _IN_BLOCKS
        if named and all(_rows_a_sample(n) < _rows_a_sample(node) for n in node.all_input_nodes):
            return (
                f"its output has the samples in blocks, one behind the other, since '{node.name}', and what "
                "is one sample's would be taken from others; keep them together, as in torch.stack([a, b], 1)"
                ".flatten(0, 1) and .unflatten(0, (-1, 2)) for torch.cat([a, b]) and .chunk(2), or call the "
                "modules once for each block"
            )
        new = [n for n in node.all_input_nodes if n not in seen and _rows_a_sample(n) > 1]
        seen.update(new)
        todo.extend(new)
    return None


_IN_BLOCKS = {"cat", "concat", "concatenate", "vstack", "repeat", "tile"}


def _rows_a_sample(node: fx.Node) -> int:
    """Return how many entries of its first dimension a sample has, 1 where that is not the batch."""
    spec = node.meta.get("spec")
    dim = spec.shape[0] if isinstance(spec, TensorSpec) and spec.shape else None
    return dim.rows() if isinstance(dim, BatchDim) else 1


def read_by(ir: TrainingGraph, module: str) -> list[Boundary]:
    """Return the boundaries by which a module reads activations: differentiable, a row for each sample."""
    return [b for b in ir.boundaries(consumer=module) if b.differentiable and has_rows(b.value)]


def unreached(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each module but the last that sends nothing differentiable, for `requires`."""
    for module in ir.modules[:-1]:
        if not ir.crossing(module.name):
            yield (
                f"module '{module.name}' sends no floating-point value to a later one, so nothing would "
                "train it; move the split to where it does"
            )


def narrow_cuts(ir: TrainingGraph, most: int = 3) -> list[str]:
    """Return some submodules after which a single value crosses, spread over the forward; `most` at most.

    Counted on the forward as it was captured, so among the submodules that stand in it.
    """
    nodes = [n for n in ir.captured.training.nodes if n.op not in ("placeholder", "output", "get_attr")]
    place = {node: i for i, node in enumerate(nodes)}
    working = [i for i, n in enumerate(nodes) if _computes(ir, n)]
    learns = set[fx.Node]()
    for node in nodes:
        sources = node.all_input_nodes
        if _computes(ir, node) or node.meta.get("random") or not learns.isdisjoint(sources):
            learns.add(node)
    reach = {n: max((place.get(user, len(nodes)) for user in n.users), default=-1) for n in learns}
    ends = {path: i for i, node in enumerate(nodes) for path, _ in node.meta.get("stack", ())}
    found: dict[fx.Node, str] = {}
    for path, end in sorted(ends.items(), key=lambda item: item[1]):
        later = [i for i in working if i > end]
        if path not in ("", "model") and later and working[0] <= end:
            stops = range(end, later[0])
            counts = [[n for n, last in reach.items() if place[n] <= i < last] for i in stops]
            for value in (crossing[0] for crossing in counts if len(crossing) == 1 and _passes(crossing[0])):
                found[value] = min(found.get(value, strip(path)), strip(path), key=lambda p: p.count("."))
    names = list(dict.fromkeys(found.values()))
    return list(dict.fromkeys(names[(2 * i + 1) * len(names) // (2 * most)] for i in range(most) if names))


def advised(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence that names `narrow_cuts`, after those that ask for other splits; none without any."""
    found = [f"'{name}'" for name in narrow_cuts(ir)]
    if found:
        yield f"a single value crosses after {', '.join(found)}"


def _passes(value: fx.Node) -> bool:
    spec = value.meta.get("spec")
    return isinstance(spec, TensorSpec) and spec.differentiable and has_rows(value)


def _computes(ir: TrainingGraph, node: fx.Node) -> bool:
    """Whether a node of a captured forward computes with parameters."""
    sources = [node, *(n for n in node.all_input_nodes if n.op == "get_attr")]
    return any(True for n in sources for _ in node_parameters(ir.root, n))


@dataclass(frozen=True)
class LentGradients(Pass):
    """Gives a module the readers' own gradients for what it lends them without a row for each sample.

    That is a parameter under `tied="owner"`, or a value computed from parameters alone: no target and no
    prediction exists for it, so it receives the gradient of each reader's local objective, as
    <value, sg[gradient]>. Runs after the passes that give the readers their objectives.
    """

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives, from the last module but one down to the first."""
        for module in reversed(ir.modules[:-1]):
            lent = [value for value in ir.crossing(module.name) if not has_rows(value)]
            terms = [t for value in lent for t in handed_down(ir, module.name, value, "lent")]
            if terms:
                ir.objective(module.name, add_all(ir, module.name, terms), "lent")
