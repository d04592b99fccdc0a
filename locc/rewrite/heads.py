"""Heads: an auxiliary network on each module but the last, and the user's loss on its result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn

from locc.errors import MethodError
from locc.ir import Owner, Task, TensorSpec, TrainingGraph, node_parameters
from locc.nn import Factory, build_head, build_pred_head, guess_layout
from locc.rewrite.building import build, build_custom
from locc.rewrite.crossing import has_rows, in_blocks
from locc.rewrite.dropout import before_dropout
from locc.rewrite.layouts import layout_at, output_layout, spec_of
from locc.rewrite.local_loss import LossLike, head_loss, heads_of
from locc.rewrite.objectives import add_all
from locc.rewrite.passes import Pass
from locc.rewrite.positions import part_of
from locc.rewrite.reach import leads_to
from locc.rewrite.unembedding import LENS, lens

POSITIONS: Mapping[str, Any] = {
    "help": "share of a sequence's positions that local heads train on, drawn anew in each step: their work "
    "falls with it where every position has a prediction",
    "range": (0.05, 1.0),
    "scale": "log",
}
RANK: Mapping[str, Any] = {
    "help": "width between the two factors of a local head's last layer; one full matrix unless given",
    "range": (8, 1024),
    "scale": "log",
}
LAYOUT: Mapping[str, Any] = {
    "help": "where the dimensions of boundaries are, if the guess from shapes is wrong",
}
LOCAL_LOSS: Mapping[str, Any] = {
    "help": "loss of (head output, target), by name or callable; the user's own unless given",
}
"""The options by which a method passes those of `AttachHeads` and `LocalLoss` on: `option(None, **RANK)`."""


@dataclass(frozen=True)
class AttachHeads(Pass):
    """Gives each output of every module but the last a head for each task, of the shape of its prediction.

    Attributes:
        head: a kind of `locc.nn.build_head`, "pred" for `build_pred_head`, or a factory (boundary spec,
            output spec) -> module. "auto" is "mlp-sr" on images and "linear" elsewhere; "bottleneck" is
            "linear" with a rank of a quarter of the boundary's width; "sr" is "linear" on a quarter of the
            positions; "unembedding" is the model's own last layer, see `lens`.
        layout: hint for `locc.nn.guess_layout` where the shape of a boundary misleads it.
        undropped: read a value before the dropout that ends its module, as `before_dropout` finds it.
        options: further keywords of the builder.
        positions: share of a sequence's positions that heads train on, drawn anew in each step; None is all,
            but for "sr".
        rank: of the last layer of a head, see `locc.nn.readout.classifier`; None is one full matrix, but for
            "bottleneck".
    """

    head: str | Factory = "auto"
    layout: str | None = None
    undropped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.positions is not None and not 0 < self.positions <= 1:
            raise MethodError(f"positions={self.positions}: give a share of the positions above 0, at most 1")
        if self.rank is not None and self.rank < 1:
            raise MethodError(f"rank={self.rank}: give a width of at least 1, or None for one full matrix")
        if self.rank is not None and (not isinstance(self.head, str) or self.head in ("fixed", LENS)):
            raise MethodError(f"rank={self.rank} is of heads that locc builds and trains; leave it out")

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Every module but the last sends a value that it can train on."""
        yield from untrained(ir)
        if isinstance(self.head, str):  # a network of the user's may know what to do
            yield from blocked(ir)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Build the heads and call them on the modules' outputs."""
        for owner, value in local_values(ir, self.undropped):
            self.attach(ir, owner, value)

    def attach(self, ir: TrainingGraph, owner: str, value: fx.Node) -> list[fx.Node]:
        """Build the heads of one value of a module, and return their results: one for each of `ir.tasks`."""
        heads = []
        for task in ir.tasks:
            layout = self.layout or layout_at(ir, value)
            read, output = value, task.spec
            if self._share is not None:
                part = part_of(ir, owner, value, task, self._share, layout)
                read, output = part.read, part.output
            if self.head == LENS:
                head = lens(ir, owner, read, value)
            else:
                network = self._build(ir, owner, read, task, output, layout)
                of_task = "_" + re.sub(r"\W+", "_", task.name) if len(ir.tasks) > 1 else ""
                path = ir.add_module(f"{owner}_head_{value.name}{of_task}", network)
                head = ir.call(owner, path, read, role="head")
            head.meta.update(given=not isinstance(self.head, str) or self.head == LENS, reads=read)
            heads.append(head)
        return heads

    @property
    def _share(self) -> float | None:
        if self.positions is None and self.head == "sr":
            return 0.25
        return None if self.positions == 1 else self.positions

    def _build(
        self, ir: TrainingGraph, owner: str, read: fx.Node, task: Task, output: TensorSpec, layout: Any
    ) -> nn.Module:
        spec = spec_of(read)
        if not isinstance(self.head, str):
            return build_custom(self.head, owner, spec, output, "head")
        options = {"layout": layout, "output_layout": output_layout(ir, task), "rank": self.rank}
        maker: Callable[..., nn.Module] = build_pred_head
        if self.head != "pred":
            maker, options["kind"] = build_head, self._kind(spec, layout)
        if self.head == "bottleneck" and self.rank is None:
            options["rank"] = max(1, guess_layout(spec, layout).channels(spec) // 4)
        return build(partial(maker, **options, **self.options), owner, spec, output)

    def _kind(self, boundary: TensorSpec, hint: Any) -> str:
        """MLP-SR was made for feature maps: its BatchNorm takes from a vector the scale that tells most."""
        if self.head == "auto":
            return "mlp-sr" if guess_layout(boundary, hint).kind == "image" else "linear"
        return "linear" if self.head in ("sr", "bottleneck") else str(self.head)

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Each module that trains, but the last, has a head for each of its outputs; others have none."""
        for owner in ir.modules:
            found = len(ir.nodes(owner.name, "head"))
            wanted = len(ir.tasks) * sum(name == owner.name for name, _ in local_values(ir, False))
            if found != wanted:
                yield f"module '{owner.name}' has {found} heads instead of {wanted}"


@dataclass(frozen=True)
class LocalLoss(Pass):
    """Gives each module with heads the sum of the losses of their results as its objective.

    Attributes:
        loss: of (head output, target), by name or callable; the user's own loss unless given.
    """

    loss: LossLike | None = field(default=None)

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add a loss to every head and an objective to every module that has some."""
        for owner in ir.modules:
            terms = [head_loss(ir, heads, self.loss) for heads in heads_of(ir, owner.name)]
            if terms:
                ir.objective(owner.name, add_all(ir, owner.name, terms), "loss")

    def ensures(self, ir: TrainingGraph) -> Iterator[str]:
        """Each module with a head has an objective."""
        for owner in ir.modules:
            if ir.nodes(owner.name, "head") and not ir.objectives(owner.name):
                yield f"module '{owner.name}' has a head and no objective"


def untrained(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each of `local_modules` that sends no value it could train on, for `requires`."""
    for owner in local_modules(ir):
        if not _trainable(ir, owner.name):
            yield (
                f"module '{owner.name}' sends no floating-point value that its own parameters compute, so no "
                "local loss can train it; move the split"
            )


def blocked(ir: TrainingGraph) -> Iterator[str]:
    """Yield a sentence for each value of `local_values` that has its samples in blocks, for `requires`."""
    for owner, value in local_values(ir, undropped=False):
        if why := in_blocks(ir, value):
            yield f"module '{owner}': {why}"


def strangers(ir: TrainingGraph) -> Iterator[str]:
    """Yield advice where a head predicts an output that is not computed from what the head reads."""
    found = []
    for owner in local_modules(ir):
        for heads in heads_of(ir, owner.name):
            value = heads[0].meta["reads"] if "reads" in heads[0].meta else heads[0].all_input_nodes[0]
            strange = [task.name for task in ir.tasks if not leads_to(value, task.value)]
            found += [(owner.name, name, value.name) for name in strange if len(heads) == len(ir.tasks) > 1]
    if found:
        owner_name, output, read = found[0]
        modules = ", ".join(f"'{name}'" for name in dict.fromkeys(name for name, _, _ in found))
        yield (
            f"a local head of module '{owner_name}' predicts output '{output}' from '{read}', of which that "
            f"is not computed (and so in {modules}), so a loss that compares outputs (two views, two "
            "towers) teaches it nothing; use a method without heads ('dtp'), or name one output, as in "
            "prediction='0'"
        )


def local_modules(ir: TrainingGraph) -> list[Owner]:
    """Return the modules that train on a local loss: all but the last and those that the user has frozen."""
    return [owner for owner in ir.modules[:-1] if not ir.frozen(owner.name)]


def local_values(ir: TrainingGraph, undropped: bool) -> list[tuple[str, fx.Node]]:
    """Return (module, value) for each value of `local_modules` on which a local loss belongs.

    Args:
        ir: the training graph.
        undropped: return what enters the dropout that ends a module instead of what leaves it.
    """
    values = [(owner.name, value) for owner in local_modules(ir) for value in _trainable(ir, owner.name)]
    return [(owner, before_dropout(ir, value) if undropped else value) for owner, value in values]


def _trainable(ir: TrainingGraph, owner: str) -> list[fx.Node]:
    return [value for value in ir.outputs(owner) if has_rows(value) and _trains(ir, value)]


def _trains(ir: TrainingGraph, value: fx.Node) -> bool:
    """Whether a parameter of the value's own module lies behind it."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        if any(p.requires_grad for _, p in node_parameters(ir.root, node)):
            return True
        here = [n for n in node.all_input_nodes if n.meta["owner"] == value.meta["owner"] and n not in seen]
        new = [n for n in here if _carries_gradient(n)]
        seen.update(new)
        todo.extend(new)
    return False


def _carries_gradient(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return not isinstance(spec, TensorSpec) or spec.differentiable
