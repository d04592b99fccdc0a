"""Shapes and layouts of values in the graph, as the builders of `locc.nn` take them."""

from __future__ import annotations

from torch import fx

from locc.ir import Task, TensorSpec, TrainingGraph
from locc.nn import Layout, layout_of

_RELAYOUTS = {
    *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "einsum"),
    *("reshape", "view", "flatten", "unflatten"),
}


def spec_of(value: fx.Node) -> TensorSpec:
    """Return the spec of a node whose value is one tensor."""
    spec = value.meta["spec"]
    assert isinstance(spec, TensorSpec)
    return spec


def prediction_spec(ir: TrainingGraph) -> TensorSpec:
    """Return the spec of the prediction, the shape that a head's result has."""
    return spec_of(ir.prediction)


def output_layout(ir: TrainingGraph, task: Task | None = None) -> Layout | None:
    """Return the layout of a dense prediction (pixels, voxels), where its layers tell; otherwise None.

    That is the main prediction, or a task's. For the `output_layout` of `locc.nn.build_head` and
    `plan_readout`.
    """
    value = ir.prediction if task is None else task.value
    return layout_at(ir, value) if len(spec_of(value).shape) > 3 else None


def layout_at(ir: TrainingGraph, value: fx.Node) -> Layout | None:
    """Return where a value's dimensions are, by the nearest layer of its module that tells, or None.

    For the `layout` of the builders of `locc.nn`, which else guess from the shape alone. The walk goes up
    through nodes of the same shape (activations, sums, dropout) and ends where dimensions move.
    """
    todo, seen = [value], {value}
    while todo:
        node = todo.pop(0)
        if node.op == "call_module":
            found = layout_of(ir.root.get_submodule(str(node.target)), spec_of(value))
            if found is not None:
                return found
        elif str(getattr(node.target, "__name__", node.target)) in _RELAYOUTS:
            continue
        same = [n for n in node.all_input_nodes if _alike(n, value) and n not in seen]
        seen.update(same)
        todo.extend(same)
    return None


def _alike(node: fx.Node, value: fx.Node) -> bool:
    spec = node.meta.get("spec")
    same_owner = node.meta["owner"] == value.meta["owner"]
    return same_owner and isinstance(spec, TensorSpec) and spec.shape == spec_of(value).shape
