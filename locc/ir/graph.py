"""The training graph: one flat `torch.fx` graph for a whole training step.

Metadata of a node, beside what capture wrote (`locc.ir.captured`):

- `owner`: name of the owner that computes it; `DATA` for the batch itself
- `role`: what it is for ("forward", "boundary", "head", "loss", "objective", ...)
- `made_by`: the stage or pass that created it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from locc.errors import GraphError
from locc.ir import ops
from locc.ir.captured import Captured, Root, owned_tensor
from locc.ir.coupling import Coupling
from locc.ir.order import program_order
from locc.ir.spec import Spec, TensorSpec
from locc.ir.tape import tape_of

DATA = "data"


@dataclass(frozen=True)
class Owner:
    """A module of the partition, or an auxiliary that trains alone (a synthesiser, an inverse).

    `index` is the position of the module in forward order; an auxiliary has the index of the module
    that it serves. `lr_scale` multiplies the learning rate of the owner's optimizer.
    """

    name: str
    index: int
    auxiliary: bool = False
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which only some owners train.

    `fit` goes through the stages in order. In each, the phases marked `warmup` run once before the first
    epoch, `epochs` passes each; the others take turns within each epoch, `epochs` passes over the data
    each. The owners in `frozen` (None: all that do not train) are in eval mode meanwhile, so that their
    BatchNorm and dropout rest as their parameters do.
    """

    name: str
    trains: tuple[str, ...]
    epochs: int = 1
    warmup: bool = False
    frozen: tuple[str, ...] | None = None
    stage: int = 0

    def freezes(self, owners: Iterable[str]) -> tuple[str, ...]:
        """Return those of a graph's owners that are in eval mode while the phase runs."""
        return tuple(o for o in owners if o not in self.trains) if self.frozen is None else self.frozen


@dataclass(frozen=True)
class Repeat:
    """A region of nodes that a step runs `times` times.

    Nodes carry the region's name in `meta["repeat"]`. For each (entry, exit) pair in `carried`, the
    value of `entry` is its own argument in the first round and the value of `exit` of the previous
    round after it.
    """

    name: str
    times: int
    carried: tuple[tuple[fx.Node, fx.Node], ...]


def carry(initial: Any) -> Any:
    """Return `initial`: the entry of a value into a repeated region."""
    return initial


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


@dataclass
class TrainingGraph:
    """The IR. Built by `partition`, rewritten by passes, lowered to programs.

    Attributes:
        root: holds the user's model (`model`) and the auxiliary networks (`aux`).
        graph: the training step.
        inference: the model's forward in eval mode, each node with its owner.
        owners: by name, modules in forward order.
        target: the placeholder of the target; its value may be any structure.
        output: the node that holds what the user's forward returns.
        prediction: the tensor that named losses and metrics read.
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
    loss: fx.Node | None = None
    phases: tuple[Phase, ...] = ()
    repeats: dict[str, Repeat] = field(default_factory=dict)
    folded: bool = False
    couplings: list[Coupling] = field(default_factory=list)
    initial: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _making: str = "partition"

    # ---- reading ----------------------------------------------------------------------------

    @property
    def modules(self) -> list[Owner]:
        """The modules of the partition, in forward order."""
        return sorted((o for o in self.owners.values() if not o.auxiliary), key=lambda o: o.index)

    @property
    def last(self) -> Owner:
        """The module that computes the output."""
        return self.modules[-1]

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

    def crossing(self, producer: str) -> list[fx.Node]:
        """Return the differentiable values that a module sends to others, each once."""
        values = {b.value: None for b in self.boundaries(producer=producer) if b.spec.differentiable}
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

    def parameters(self, owner: str) -> dict[str, nn.Parameter]:
        """Return the parameters that an owner's nodes use, by path under the root."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for node in self.nodes(owner):
            for path, parameter in node_parameters(self.root, node):
                found.setdefault(id(parameter), (path, parameter))
        return dict(found.values())

    # ---- writing ----------------------------------------------------------------------------

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Attribute the nodes created inside to the pass `name`."""
        before, self._making = self._making, name
        try:
            yield
        finally:
            self._making = before

    def emit(
        self,
        owner: str,
        function: Callable[..., Any],
        *args: Any,
        role: str = "compute",
        name: str | None = None,
        spec: Spec = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Add a call of `function` to the owner's program and return its node."""
        return self._place("call_function", function, args, kwargs, owner, role, name, spec)

    def call(
        self, owner: str, path: str, *args: Any, role: str = "forward", spec: Spec = None, **kw: Any
    ) -> fx.Node:
        """Add a call of the submodule at `path` (as `add_module` returned it)."""
        return self._place("call_module", path, args, kw, owner, role, None, spec)

    def read(self, owner: str, path: str, role: str = "parameter") -> fx.Node:
        """Add a read of the parameter, buffer or module at `path`; one node for each owner and path."""
        found: fx.Node
        for found in self.graph.nodes:
            if found.op == "get_attr" and found.target == path and found.meta["owner"] == owner:
                return found
        tensor = owned_tensor(self.root, path)
        spec = TensorSpec.of(tensor) if isinstance(tensor, torch.Tensor) else None
        node = self._place("get_attr", path, (), {}, owner, role, None, spec)
        self._first().prepend(node)
        return node

    def _first(self) -> fx.Node:
        first: fx.Node = next(n for n in self.graph.nodes if n.op != "placeholder")
        return first

    def _place(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        owner: str,
        role: str,
        name: str | None,
        spec: Spec,
    ) -> fx.Node:
        if owner not in self.owners:
            raise GraphError(f"pass '{self._making}' emits for owner '{owner}', which does not exist")
        if name is None and op == "call_function":
            # Not the function's own name: printed code would shadow the function.
            name = role if role != getattr(target, "__name__", "") else f"{role}_of_{owner}"
        with self.graph.inserting_before(self._end()):
            node: fx.Node = self.graph.create_node(op, target, tuple(args), dict(kwargs), name)
        node.meta.update(owner=owner, role=role, made_by=self._making, spec=spec)
        return node

    def _end(self) -> fx.Node:
        end: fx.Node = next(iter(reversed(self.graph.nodes)))
        return end

    def add_owner(self, name: str, serves: Owner, lr_scale: float = 1.0) -> Owner:
        """Add an auxiliary that trains alone, for the module `serves`."""
        if name in self.owners:
            raise GraphError(f"owner '{name}' exists twice")
        self.owners[name] = Owner(name, serves.index, auxiliary=True, lr_scale=lr_scale)
        return self.owners[name]

    def scale_lr(self, name: str, lr_scale: float) -> None:
        """Multiply the learning rate of an owner's optimizer."""
        self.owners[name] = replace(self.owners[name], lr_scale=lr_scale)

    def add_module(self, name: str, module: nn.Module) -> str:
        """Register an auxiliary network and return its path."""
        key = name.replace(".", "_")
        while key in self.root.aux:  # submodules `a.b_c` and `a_b.c` would share one name
            key += "_"
        self.root.aux[key] = module
        return f"aux.{key}"

    def stop_gradient(self, owner: str, value: fx.Node, role: str = "import") -> fx.Node:
        """Bring `value` into the owner's program without its tape; one node for each owner and value."""
        for user in value.users:
            if user.target is ops.stop_gradient and user.meta["owner"] == owner:
                return user
        if value.meta["owner"] in (owner, DATA) and role == "import" and value.op == "placeholder":
            return value
        name = f"{value.name}_at_{owner}"
        return self.emit(owner, ops.stop_gradient, value, role=role, name=name, spec=value.meta.get("spec"))

    def objective(self, owner: str, scalar: fx.Node, name: str) -> fx.Node:
        """Declare `scalar` an objective of the owner, reported as `<owner>.<name>`."""
        node = self.emit(owner, ops.objective, scalar, role="objective", spec=TensorSpec((), torch.float32))
        node.meta["objective"] = f"{owner}.{name}"
        return node

    def gradient(self, scalar: fx.Node, wrt: fx.Node) -> fx.Node:
        """Add d(scalar)/d(wrt) as a value; both belong to the same owner."""
        owner = scalar.meta["owner"]
        return self.emit(
            owner,
            ops.gradient,
            scalar,
            wrt,
            role="gradient",
            name=f"grad_{wrt.name}",
            spec=wrt.meta.get("spec"),
        )

    def assign(self, owner: str, path: str, value: fx.Node) -> fx.Node:
        """Set the parameter or buffer at `path` to `value` after everything in the step has read it."""
        target = self.read(owner, path, role="state")
        return self.emit(owner, ops.assign, target, value, role="assign")

    def apply_loss(self) -> fx.Node:
        """Apply the user's loss to the output, once; the node belongs to the last module."""
        if self.loss is None:
            self.loss = self.emit(
                self.last.name,
                self.loss_function,
                self.output,
                self.target,
                role="loss",
                name="loss",
                spec=TensorSpec((), torch.float32),
            )
        return self.loss

    def replay(
        self, owner: str, inputs: dict[fx.Node, fx.Node], wanted: list[fx.Node], role: str
    ) -> list[fx.Node]:
        """Run the owner's forward once more on other inputs.

        Args:
            owner: whose forward to run; its parameters are used live, its buffers stay unchanged.
            inputs: boundary entry -> the value that takes its place (of the same spec).
            wanted: nodes of the owner's forward whose new values are returned.
            role: the role of the new nodes.
        """
        copies: dict[fx.Node, fx.Node] = dict(inputs)
        needed = self._between(owner, set(inputs), wanted)
        for node in [n for n in self.graph.nodes if n in needed]:
            copies[node] = self._copy_quietly(node, copies, role)
        return [copies[n] for n in wanted]

    def _between(self, owner: str, entries: set[fx.Node], wanted: list[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            if node in needed or node in entries or node.meta["owner"] != owner or node.op == "get_attr":
                continue
            if node.meta["role"] == "boundary":
                continue
            needed.add(node)
            todo.extend(node.all_input_nodes)
        return needed

    def _copy_quietly(self, node: fx.Node, copies: dict[fx.Node, fx.Node], role: str) -> fx.Node:
        def follow(n: fx.Node) -> fx.Node:
            return copies.get(n, n)

        args, kwargs = fx.map_arg(node.args, follow), fx.map_arg(node.kwargs, follow)
        owner, spec = node.meta["owner"], node.meta.get("spec")
        if node.op == "call_module":
            module = owned_tensor(self.root, str(node.target))
            assert isinstance(module, nn.Module)
            if any(True for _ in module.buffers()):
                holder = self.read(owner, str(node.target), role="module")
                return self.emit(owner, ops.call_quietly, holder, args, kwargs, role=role, spec=spec)
        made = self._place(node.op, node.target, args, kwargs, owner, role, None, spec)
        made.meta.update({k: node.meta[k] for k in ("random", "line") if k in node.meta})
        if "mutates" in node.meta:
            made.meta["mutates"] = tuple(copies.get(n, n) for n in node.meta["mutates"])
        return made

    def tidy(self) -> None:
        """Remove dead nodes and bring the graph into program order, grouped by owner."""
        self._drop_dead()
        end = self._end()
        for node in program_order(self):
            if node is not end:
                end.prepend(node)

    def _drop_dead(self) -> None:
        keep = {self.output, self.prediction, self.target, self.loss, *self.inputs}
        keep.update(end for region in self.repeats.values() for _, end in region.carried)
        for node in reversed(list(self.graph.nodes)):
            pure = node.op in ("call_function", "call_method", "get_attr") and node.target not in (
                ops.objective,
                ops.assign,
            )
            forward = node.meta.get("role") == "forward"
            if pure and not forward and not node.users and node not in keep:
                self.graph.erase_node(node)

    def __str__(self) -> str:
        from locc.ir.printer import render

        return render(self)


def node_parameters(root: nn.Module, node: fx.Node) -> list[tuple[str, nn.Parameter]]:
    """Return the (path, parameter) pairs that running `node` reads from the root itself."""
    if node.op not in ("call_module", "get_attr"):
        return []
    path = str(node.target)
    held = owned_tensor(root, path)
    if isinstance(held, nn.Parameter):
        return [(path, held)]
    if not isinstance(held, nn.Module):
        return []
    replaced = replaced_names(node)
    return [(f"{path}.{n}" if n else path, p) for n, p in held.named_parameters() if n not in replaced]


def node_modules(root: nn.Module, node: fx.Node) -> list[nn.Module]:
    """Return the module that `node` calls, or reads for another node to call, and its submodules."""
    if node.op not in ("call_module", "get_attr"):
        return []
    held = owned_tensor(root, str(node.target))
    return list(held.modules()) if isinstance(held, nn.Module) else []


def replaced_names(node: fx.Node) -> set[str]:
    """Return the tensor names that every `call_with` on a module read by `node` replaces."""
    uses = [u for u in node.users if u.target is ops.call_with and u.args[0] is node]
    if not uses or len(uses) != len(node.users):
        return set()
    names = [set(u.args[1]) for u in uses if isinstance(u.args[1], dict)]
    return set.intersection(*names) if names else set()
