"""The loss of local heads: the part of the user's loss that reads the predictions.

A module has a head for each task, and none for what else the model returns (auxiliary logits, features).
Terms of the loss that read something else are left out of its sum. The model's own loss (`loss="model"`) is
part of the captured graph: what it computes from the predictions and from the batch is computed once more on
the heads' results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from locc.errors import MethodError
from locc.ir import Rebuild, TrainingGraph, node_parameters
from locc.losses import MODEL, Loss, own_loss
from locc.rewrite.positions import at_positions, example_of, target_for
from locc.rewrite.traits import bounds_of

LossLike = str | Callable[[Any, Any], Tensor]
"""A loss: a name of `locc.losses`, or a callable (output, target) -> 0-d tensor."""

_SUMS = {"add", "add_", "iadd", "__add__", "__radd__", "__iadd__"}
_DIFFERENCES = {"sub", "__sub__"}


def heads_of(ir: TrainingGraph, owner: str) -> list[list[fx.Node]]:
    """Return the heads of a module, those on one value together: one for each of `ir.tasks`, in order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for head in ir.nodes(owner, "head"):
        found.setdefault(_reads(head), []).append(head)
    return list(found.values())


def _reads(head: fx.Node) -> fx.Node:
    """Return the value of its module that a head reads."""
    found = head.meta.get("reads", head.all_input_nodes[0])
    assert isinstance(found, fx.Node)
    return found


def head_loss(ir: TrainingGraph, heads: fx.Node | Sequence[fx.Node], loss: LossLike | None = None) -> fx.Node:
    """Return the loss of the heads' results (shape []), in the program of their owner.

    That is `loss`, or the part of the user's own that reads the predictions.

    Args:
        ir: the training graph.
        heads: one for each of `ir.tasks`, in their order, see `heads_of`.
        loss: a local loss; of several heads it takes what the user's own does.

    Raises:
        MethodError: the model's own loss has no such part.
    """
    heads = [heads] if isinstance(heads, fx.Node) else list(heads)
    owner, own = str(heads[0].meta["owner"]), Loss.of(ir.loss_function)
    read = _reads(heads[0])
    if loss is None:
        heads = [_bounded(ir, head, task.value) for head, task in zip(heads, ir.tasks, strict=True)]
    if read.target is at_positions and (len(heads) > 1 or (own.name == MODEL and loss is None)):
        what = "the loss that the model computes itself" if own.name == MODEL else "a loss of several outputs"
        raise MethodError(
            f"module '{owner}': a head on a part of the positions takes from the target what belongs to "
            f"them, and {what} reads labels in its own way; leave out positions= and head='sr', or pass "
            "loss='cross_entropy' and the labels as the target"
        )
    target = target_for(ir, owner, read)
    if own.name == MODEL and loss is None:
        return _Again(ir, owner, heads).made(_own_loss(ir))
    value = heads[0]
    nested = len(heads) > 1 or (own.name is None and loss is None)
    if nested and isinstance(ir.output.target, Rebuild):
        given = Imitated(ir.output, [task.value for task in ir.tasks])
        value = ir.emit(owner, given, *heads, role="head_output")
    function = ir.loss_function if loss is None else own.like(loss)
    return ir.emit(owner, function, value, target, role="head_loss", spec=ir.scalar)


def _bounded(ir: TrainingGraph, head: fx.Node, prediction: fx.Node) -> fx.Node:
    """Return a head's result in the range of what it imitates, where that ends in a sigmoid or the like."""
    found = None if head.meta.get("given") else bounds_of(prediction, ir.root)
    if found is None:
        return head
    function, *dim = found
    return ir.emit(str(head.meta["owner"]), function, head, *dim, role="bounded")


class Imitated:
    """What the user's forward returns, with heads' results in the places of the predictions."""

    def __init__(self, output: fx.Node, predictions: Sequence[fx.Node]) -> None:
        assert isinstance(output.target, Rebuild)
        self.rebuild = output.target
        self.values = [Absent() if isinstance(v, fx.Node) else v for v in output.args]
        self.places = {i: predictions.index(v) for i, v in enumerate(output.args) if v in predictions}
        self.__name__ = self.__qualname__ = self.rebuild.__name__

    def __call__(self, *heads: Tensor) -> Any:
        """Return the structure for the heads' results."""
        return self.rebuild(
            *[heads[self.places[i]] if i in self.places else v for i, v in enumerate(self.values)]
        )


def _named(function: Any) -> str:
    return str(getattr(function, "__name__", function)).partition(".")[0]


class Absent:
    """Stands for an output of the model that a head does not give: whatever reads it is left out of a sum."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what is left of a sum, and nothing of anything else."""
        if kwargs or _named(func) not in _SUMS | _DIFFERENCES:  # with alpha=, a weighted sum
            return Absent()
        one, other = args[:2]
        if not isinstance(one, Absent):
            return _left(one)
        return -_left(other) if _named(func) in _DIFFERENCES else _left(other)

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()

    def __call__(self, *_: Any, **__: Any) -> Absent:
        """Return nothing of a method's result."""
        return Absent()

    def __add__(self, other: Any) -> Any:
        return _left(other)

    __radd__ = __rsub__ = __add__

    def __sub__(self, other: Any) -> Any:
        return -_left(other)

    def _gone(self, *_: Any) -> Absent:
        return Absent()

    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __matmul__ = __rmatmul__ = _gone
    __neg__ = __getitem__ = _gone

    def __bool__(self) -> bool:
        raise TypeError("the value of an output that a head does not give")


def _left(other: Any) -> Any:
    """Return what is left of a sum with an absent term: a mere number is no term that reads a prediction."""
    return Absent() if isinstance(other, (int, float)) else other


def unread(name: str, why: str) -> MethodError:
    """Return the error for a loss without a part that reads the prediction alone."""
    return MethodError(
        f"loss '{name}' has no part that reads the model's prediction alone ({why}), and a module's head "
        "gives the prediction alone; pass local_loss=callable(head_output, target) for modules before the "
        "last"
    )


def check_heads(ir: TrainingGraph, sample: Callable[[fx.Node], Tensor], target: Any) -> None:
    """Try the user's loss on what a head gives.

    Args:
        ir: the training graph, with heads.
        sample: a random value of a node's spec, within 0 and 1.
        target: one that the loss takes with the whole output.

    Raises:
        MethodError: it has no part that reads the prediction alone, or does not take what a head gives.
    """
    loss = Loss.of(ir.loss_function)
    for term in [n for n in ir.nodes(role="head_loss") if isinstance(n.target, Loss)][:1]:
        read, label = term.all_input_nodes
        target = example_of(label, target)
        if target is None:
            return
        nested = read.meta["role"] == "head_output"
        heads = [sample(head) for head in (read.all_input_nodes if nested else [read])]
        if nested and (why := _failure(term, read, heads, target)):
            raise unread(loss.__name__, why)
        free = term.target is ir.loss_function and loss.name is None and not _in_range(read)
        if free and (why := _failure(term, read, [8 * head - 4 for head in heads], target)):
            raise MethodError(
                f"loss '{loss.__name__}' does not take every number that a module's head may give ({why}), "
                "and no sigmoid or softmax is seen to end the prediction; call it in the forward of the "
                "model itself, let the loss take scores (binary_cross_entropy_with_logits), or pass "
                "local_loss=callable(head_output, target)"
            )


def _failure(term: fx.Node, read: fx.Node, heads: Sequence[Tensor], target: Any) -> str | None:
    """Say why the loss `term` fails on what heads give, in the place of `read`, if it does."""
    try:
        value = read.target(*heads) if isinstance(read.target, Imitated) else heads[0]
        term.target(value, target)  # type: ignore[operator]
    except Exception as error:  # whatever the user's code raises
        return f"{type(error).__name__}: {error}"
    return None


def _in_range(read: fx.Node) -> bool:
    """Whether a head ends as the prediction does, or is the user's own, who knows best."""
    heads = read.all_input_nodes if read.meta["role"] == "head_output" else [read]
    return any(head.meta["role"] == "bounded" or head.meta.get("given") for head in heads)


def _own_loss(ir: TrainingGraph) -> fx.Node:
    """Return the node of the model's own loss."""
    found = own_loss(ir.output_structure())
    if not isinstance(found, fx.Node):
        raise unread(MODEL, "its 'loss' is no tensor")
    return found


class _Again:
    """Copies what computes the model's loss into a module's program, less terms that read something else."""

    def __init__(self, ir: TrainingGraph, owner: str, heads: Sequence[fx.Node]) -> None:
        self.ir, self.owner = ir, owner
        values = [task.value for task in ir.tasks]
        self.copies: dict[fx.Node, fx.Node] = dict(zip(values, heads, strict=True))
        self.kinds: dict[fx.Node, tuple[bool, bool]] = dict.fromkeys(values, (True, False))

    def made(self, node: fx.Node) -> fx.Node:
        """Return the part of `node` that reads the predictions, computed from the heads' results."""
        reads, foreign = self.kind(node)
        if not foreign and reads:
            return self.copy(node)
        within = [n for n in node.all_input_nodes if self.kind(n)[0]]
        if _named(node.target) in _SUMS and not node.kwargs and len(within) == 1:
            return self.made(within[0])
        raise unread(MODEL, f"'{node.name}' reads something else that the model computes")

    def kind(self, node: fx.Node) -> tuple[bool, bool]:
        """Return whether a node depends on a prediction, and whether on anything but these and the batch."""
        if node not in self.kinds:
            below = [self.kind(n) for n in node.all_input_nodes]
            trained = any(True for _ in node_parameters(self.ir.root, node))
            foreign = trained or node.meta.get("role") == "boundary" or any(f for _, f in below)
            self.kinds[node] = any(r for r, _ in below), foreign
        return self.kinds[node]

    def copy(self, node: fx.Node) -> fx.Node:
        """Return a node of the owner that computes what `node` does, from the heads' results."""
        if node.op == "placeholder":
            return node
        if node not in self.copies:
            self.copies[node] = self.ir.copied(self.owner, node, self.copy, "head_loss")
        return self.copies[node]
