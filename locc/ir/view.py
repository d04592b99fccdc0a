"""The training graph as data: owners, phases, regions, and what one can ask of them.

Metadata of a node, beside what capture wrote (`locc.ir.captured`):

- `owner`: name of the owner that computes it; `DATA` for the batch itself
- `role`: what it is for ("forward", "boundary", "head", "loss", "objective", ...)
- `made_by`: the stage or pass that created it
- `state`: for a read of a state that lives across steps, the path of its `locc.ir.state.State`
- `random`: True where it draws random numbers; `untried`: True where that could not be tried
- `stream`: the node whose random numbers it draws, where it is a copy that draws the same
- `contracts`: True where it multiplies or solves matrices (absent otherwise)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from locc.ir import ops
from locc.ir.calls import Switched
from locc.ir.captured import Captured, Root, owned_tensor
from locc.ir.coupling import Coupling
from locc.ir.infer import Inferred
from locc.ir.spec import TensorSpec
from locc.ir.state import State
from locc.ir.tape import tape_of
from locc.ir.task import Task

DATA = "data"


@dataclass(frozen=True)
class Owner:
    """A module of the partition, or an auxiliary that trains alone (a synthesiser, an inverse).

    `index` is the position of the module in forward order; an auxiliary has the index of the module
    that it serves. `lr_scale` multiplies the learning rate of the owner's optimizer. With `keeps_norms` each
    update leaves the owner's weights (parameters of two or more dimensions) at the norm that they had.
    """

    name: str
    index: int
    auxiliary: bool = False
    lr_scale: float = 1.0
    keeps_norms: bool = False


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which only some owners train.

    `fit` goes through the stages in order. In each, the phases marked `warmup` run once before the first
    epoch, `epochs` passes each; the others take turns within each epoch, `epochs` passes over the data
    each. The owners in `frozen` (None: all that do not train) are in eval mode meanwhile, so that their
    BatchNorm and dropout rest as their parameters do.

    With `steps`, a pass is so many steps on `made`, a target of the method's own, and reads no data. `lr` is
    the learning rate meanwhile, whatever that of the optimizers is.
    """

    name: str
    trains: tuple[str, ...]
    epochs: int = 1
    warmup: bool = False
    frozen: tuple[str, ...] | None = None
    stage: int = 0
    steps: int | None = None
    made: torch.Tensor | None = field(default=None, compare=False, repr=False)
    lr: float | None = None

    def __str__(self) -> str:
        length = f"{self.epochs} pass(es)" if self.steps is None else f"{self.steps} step(s) without data"
        when = "before the first epoch" if self.warmup else "in each epoch"
        stage = f" of stage {self.stage}" if self.stage else ""
        rate = "" if self.lr is None else f" at a learning rate of {self.lr:g}"
        freezes = "" if self.frozen is None else f"; freezes: {', '.join(self.frozen) or 'nothing'}"
        return f"'{self.name}', {length} {when}{stage}, trains: {', '.join(self.trains)}{rate}{freezes}"

    def freezes(self, owners: Iterable[str]) -> tuple[str, ...]:
        """Return those of a graph's owners that are in eval mode while the phase runs."""
        return tuple(o for o in owners if o not in self.trains) if self.frozen is None else self.frozen


@dataclass(frozen=True)
class Repeat:
    """A region of nodes that a step runs `times` times.

    Nodes carry the region's name in `meta["repeat"]`. For each (entry, exit) pair in `carried`, `entry`, an
    `ops.carry`, has the value of its own argument in the first round and that of `exit` of the previous round
    after it, without a tape.
    """

    name: str
    times: int
    carried: tuple[tuple[fx.Node, fx.Node], ...]


@dataclass(frozen=True)
class Boundary:
    """A value that passes from one module to a later one.

    `value` is the producer's node, `entry` the consumer's `stop_gradient` of it.
    """

    producer: str
    consumer: str
    value: fx.Node
    entry: fx.Node

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the value."""
        spec = self.value.meta["spec"]
        assert isinstance(spec, TensorSpec)
        return spec

    @property
    def differentiable(self) -> bool:
        """Whether a gradient can come back through the value."""
        return self.spec.differentiable and not self.value.meta.get("constant", False)


@dataclass
class View:
    """The fields of a training graph, and what they say.

    Attributes:
        root: holds the user's model (`model`) and the auxiliary networks (`aux`).
        graph: the training step.
        inference: the model's forward in eval mode, each node with its owner.
        owners: by name, modules in forward order.
        target: the placeholder of the target; its value may be any structure.
        output: the node that holds what the user's forward returns.
        prediction: the tensor that named losses and metrics read.
        tasks: the predictions that local heads imitate, `prediction` first; mostly that alone.
        loss: the user's loss on `output`, or None for a method without one.
        initial: (parameter, value) pairs that a method starts from; written when compilation has succeeded.
    """

    root: Root
    graph: fx.Graph
    inference: fx.Graph
    captured: Captured
    owners: dict[str, Owner]
    inputs: tuple[fx.Node, ...]
    target: fx.Node
    output: fx.Node
    prediction: fx.Node
    loss_function: Callable[[Any, Any], torch.Tensor]
    tasks: tuple[Task, ...] = ()
    loss: fx.Node | None = None
    phases: tuple[Phase, ...] = ()
    repeats: dict[str, Repeat] = field(default_factory=dict)
    folded: bool = False
    couplings: list[Coupling] = field(default_factory=list)
    initial: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _making: str = "partition"
    _replays: int = 0
    _tried: dict[Hashable, Inferred | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks = self.tasks or (Task(self.prediction.name, self.prediction),)

    # ---- reading ----------------------------------------------------------------------------

    @property
    def modules(self) -> list[Owner]:
        """The modules of the partition, in forward order."""
        return sorted((o for o in self.owners.values() if not o.auxiliary), key=lambda o: o.index)

    @property
    def last(self) -> Owner:
        """The module that computes the output."""
        return self.modules[-1]

    def output_structure(self) -> Any:
        """Return what the user's forward returns, with nodes in the place of tensors."""
        rebuild = self.output.target
        return rebuild.build(list(self.output.args)) if isinstance(rebuild, ops.Rebuild) else self.output

    @property
    def scalar(self) -> TensorSpec:
        """The spec of the user's loss: a number of the prediction's dtype."""
        spec = self.prediction.meta["spec"]
        return TensorSpec((), spec.dtype)

    def nodes(self, owner: str | None = None, role: str | None = None) -> list[fx.Node]:
        """Return the nodes of an owner and a role, in program order."""
        return [
            n
            for n in self.graph.nodes
            if (owner is None or n.meta.get("owner") == owner)
            and (role is None or n.meta.get("role") == role)
        ]

    def boundaries(self, producer: str | None = None, consumer: str | None = None) -> list[Boundary]:
        """Return the boundary values, of one producer or to one consumer where given."""
        found = []
        for entry in self.nodes(role="boundary"):
            (value,) = entry.all_input_nodes
            item = Boundary(value.meta["owner"], entry.meta["owner"], value, entry)
            if producer in (None, item.producer) and consumer in (None, item.consumer):
                found.append(item)
        return found

    def keeps(self, node: fx.Node) -> bool:
        """Whether an `assign` keeps a delayed value for later: it runs in every step that reads the delay."""
        return node.target is ops.assign and self._delayed(node.all_input_nodes[0])

    def _delayed(self, node: fx.Node) -> bool:
        held = owned_tensor(self.root, node.meta["state"]) if "state" in node.meta else None
        return node.op == "get_attr" and isinstance(held, State) and held.delays

    def crossing(self, producer: str) -> list[fx.Node]:
        """Return the differentiable values that a module sends to others, each once."""
        values = {b.value: None for b in self.boundaries(producer=producer) if b.differentiable}
        return list(values)

    def outputs(self, owner: str) -> list[fx.Node]:
        """Return the activations on which a local objective of a module belongs.

        These are the differentiable values that it sends to others, without those from which it
        computes another of them (an objective on the later value reaches the earlier one as well),
        and without parameters that another module borrows.
        """
        values = [v for v in self.crossing(owner) if v.op != "get_attr"]
        tapes = {v: tape_of(v) for v in values}
        return [v for v in values if not any(v in tapes[w] for w in values if w is not v)]

    def objectives(self, owner: str | None = None) -> list[fx.Node]:
        """Return the objective nodes."""
        return [n for n in self.nodes(owner) if n.target is ops.objective]

    def gradients(self) -> list[fx.Node]:
        """Return the `gradient` nodes."""
        return [n for n in self.graph.nodes if n.target is ops.gradient]

    def frozen(self, owner: str) -> bool:
        """Whether the user has frozen all parameters of the model that an owner has."""
        held = [p for path, p in self.parameters(owner).items() if path.startswith("model.")]
        return bool(held) and not any(p.requires_grad for p in held)

    def parameters(self, owner: str) -> dict[str, nn.Parameter]:
        """Return the parameters that an owner's nodes use, by path under the root."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for node in self.nodes(owner):
            for path, parameter in node_parameters(self.root, node):
                found.setdefault(id(parameter), (path, parameter))
        return dict(found.values())


def node_tensors(root: nn.Module, node: fx.Node) -> list[tuple[str, torch.Tensor]]:
    """Return the (path, tensor) pairs, parameters and buffers, that running `node` reads from the root."""
    if node.op not in ("call_module", "get_attr"):
        return []
    path = str(node.target)
    held = owned_tensor(root, path)
    if isinstance(held, torch.Tensor):
        return [(path, held)]
    if not isinstance(held, nn.Module):
        return []
    replaced = replaced_names(node)
    every = (*held.named_parameters(), *held.named_buffers())
    return [(f"{path}.{n}" if n else path, t) for n, t in every if n not in replaced]


def node_parameters(root: nn.Module, node: fx.Node) -> list[tuple[str, nn.Parameter]]:
    """Return the (path, parameter) pairs that running `node` reads from the root."""
    return [(path, t) for path, t in node_tensors(root, node) if isinstance(t, nn.Parameter)]


def node_modules(root: nn.Module, node: fx.Node) -> list[nn.Module]:
    """Return the module that `node` calls, or reads for another node to call, and its submodules."""
    if isinstance(node.target, Switched):
        return [node.target]
    if node.op not in ("call_module", "get_attr"):
        return []
    held = owned_tensor(root, str(node.target))
    return list(held.modules()) if isinstance(held, nn.Module) else []


def replaced_names(node: fx.Node) -> set[str]:
    """Return the tensor names that every `call_with` on a module read by `node` replaces."""
    names = [_replaced(use, node) for use in node.users]
    return set.intersection(*names) if names else set()


def _replaced(use: fx.Node, holder: fx.Node) -> set[str]:
    """Return the names that a `call_with`, or an operation made of one (its derivative), replaces."""
    args = use.args
    if getattr(use.target, "target", None) is ops.call_with:
        args = args[1][0]  # type: ignore[index, assignment]
    elif use.target is not ops.call_with:
        return set()
    return set(args[1]) if args[0] is holder and isinstance(args[1], dict) else set()


def draws(root: nn.Module, node: fx.Node) -> bool:
    """Whether `node` may draw random numbers: it has, was not tried, or holds dropout.

    A function that cannot be tried, for what it reads is unknown yet, may say that it `draws` none.
    """
    if node.meta.get("random") or (node.meta.get("untried") and getattr(node.target, "draws", True)):
        return True
    holder = node if node.op == "call_module" else node.args[0] if node.target in _HOLDING else None
    module = owned_tensor(root, str(holder.target)) if isinstance(holder, fx.Node) else None
    found = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(m, nn.modules.dropout._DropoutNd) for m in found)


def stream_of(node: fx.Node) -> str:
    """Return the name of the random stream of a node that draws: its own, or that of the node it is like."""
    alike: fx.Node = node.meta.get("stream", node)
    return alike.name


_HOLDING = (ops.call_with, ops.call_quietly)
