"""The model's own last layer as a local head that does not train it: the logit lens."""

from __future__ import annotations

from torch import fx, nn

from locc.errors import MethodError
from locc.ir import TrainingGraph
from locc.ir.captured import owned_tensor
from locc.ir.ops import call_with
from locc.rewrite.layouts import spec_of

LENS = "unembedding"
"""What a user calls it."""


def lens(ir: TrainingGraph, owner: str, read: fx.Node, value: fx.Node) -> fx.Node:
    """Return what the layers that end the model make of a value of `owner`, a head in its program.

    These are the submodule that gives the prediction, with the normalisation before it, if there is one. They
    belong to the last module, which trains them; here they have the values from before the step. After
    nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Args:
        ir: the training graph.
        owner: the module whose head it is.
        read: what it reads: `value`, or a part of its positions.
        value: what the module sends.

    Raises:
        MethodError: the model does not end so, or on values of another shape.
    """
    last = ir.prediction
    ends = last.op == "call_module" and len(last.all_input_nodes) == 1
    entering = last.all_input_nodes[0] if ends else last
    if not ends or spec_of(entering) != spec_of(value):
        what = f"its last submodule reads {spec_of(entering)}" if ends else f"it ends in '{last.name}'"
        raise MethodError(
            f"module '{owner}': head='{LENS}' needs a model whose prediction a submodule computes from "
            f"values of the boundary's shape, {spec_of(value)}; {what}. Use head='linear' or 'bottleneck'"
        )
    layers = [last]
    normed = entering.op == "call_module" and "Norm" in type(_held(ir, entering)).__name__
    if normed and spec_of(entering.all_input_nodes[0]) == spec_of(value):
        layers.insert(0, entering)
    for layer in layers:
        path = str(layer.target)
        holder = ir.read(owner, path, role="module")
        held = _held(ir, layer)
        tensors = {
            name: ir.stop_gradient(owner, ir.read(str(layer.meta["owner"]), f"{path}.{name}"))
            for name, _ in (*held.named_parameters(), *held.named_buffers())
        }
        role = "head" if layer is last else "lens"
        read = ir.emit(owner, call_with, holder, tensors, (read,), {}, role=role)
    return read


def _held(ir: TrainingGraph, node: fx.Node) -> nn.Module:
    found = owned_tensor(ir.root, str(node.target))
    assert isinstance(found, nn.Module)
    return found
