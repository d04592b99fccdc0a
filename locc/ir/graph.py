"""The training graph: one flat `torch.fx` graph for a whole training step, and the verbs that rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx, nn

from locc.errors import GraphError
from locc.ir import ops
from locc.ir.captured import owned_tensor
from locc.ir.order import dependencies, program_order
from locc.ir.printer import render
from locc.ir.spec import TensorSpec
from locc.ir.state import RESIZE, State, renewed
from locc.ir.tape import changers
from locc.ir.view import Repeat, draws
from locc.ir.writing import Writer

_KEPT = ("random", "untried", "line", "contracts", "views")


@dataclass
class TrainingGraph(Writer):
    """The IR. Built by `partition`, rewritten by passes, lowered to programs."""

    # ---- time -------------------------------------------------------------------------------

    def state(
        self,
        owner: str,
        name: str,
        spec: TensorSpec,
        initial: float | torch.Tensor = 0.0,
        *,
        reset: fx.Node | None = None,
        resize: str = "reset",
        delays: bool = False,
    ) -> fx.Node:
        """Add a tensor of the owner that lives across steps, and return its value of before the step.

        `ir.assign(owner, state, value)` sets what the next step reads. It is saved, restored and moved like
        a buffer.

        Args:
            owner: who reads and assigns it.
            name: what to call it.
            spec: shape and dtype; with the batch dimension, it is allocated when the first batch comes.
            initial: what it starts from: a number, or a tensor that broadcasts to the shape.
            reset: a flag of the batch, [] for the whole state or [B] for each sample along its batch
                dimension: what starts from `initial` in this step.
            resize: what another batch size does: "reset" starts anew, "error" is refused.
            delays: whether it only keeps a value for later, so that it moves in each phase that reads it.

        Raises:
            GraphError: `resize` is neither, `initial` does not broadcast, a dimension other than the
                batch may vary, or `reset` is of another shape.
        """
        if resize not in RESIZE:
            raise GraphError(f"state '{name}' of '{owner}': resize={resize!r}; choose 'reset' or 'error'")
        if spec.free:
            raise GraphError(
                f"state '{name}' of '{owner}' would be {spec}, and '{spec.free[0].name}' may vary from step "
                "to step (dynamic); a state keeps its size, but for the batch"
            )
        try:
            held = State(owner, name, spec, initial, resize, delays)
        except RuntimeError as error:
            raise GraphError(f"state '{name}' of '{owner}': initial does not fit {spec}: {error}") from error
        dim = spec.batch_dim
        flag = reset.meta.get("spec") if reset is not None else None
        if isinstance(flag, TensorSpec) and flag.shape not in ((), () if dim is None else (spec.shape[dim],)):
            raise GraphError(
                f"state '{name}' of '{owner}' is {spec}, and reset= is {flag}; give a flag [] for the whole "
                "state, or one for each sample, as long as the state's batch dimension"
            )
        path = self.add_module(name, held)
        node = self.read(owner, f"{path}.value", role="state", name=name)
        node.meta.update(spec=spec, state=path)
        if reset is None:
            return node
        start = self.read(owner, f"{path}.initial", role="state")
        along = (dim,) if dim else ()
        read = self.emit(owner, renewed, reset, node, start, *along, role="state", spec=spec)
        read.meta["state"] = path
        return read

    def delay(
        self,
        value: fx.Node,
        steps: int = 1,
        initial: float | torch.Tensor = 0.0,
        *,
        owner: str | None = None,
        spec: TensorSpec | None = None,
        resize: str = "reset",
    ) -> fx.Node:
        """Return `value` as it was `steps` steps ago, and `initial` before that; keeps that many copies.

        Args:
            value: a value of the owner, or of the batch.
            steps: how many.
            initial: as in `state`.
            owner: whose copies they are; the value's owner, who must be named for a value of the batch.
            spec: of a value that has none (the target).
            resize: as in `state`.

        Raises:
            GraphError: an argument is unusable.
        """
        owner = str(value.meta["owner"]) if owner is None else owner
        spec = value.meta.get("spec") if spec is None else spec
        if not isinstance(spec, TensorSpec) or owner not in self.owners or steps < 0:
            raise GraphError(
                f"ir.delay('{value.name}', {steps}) needs a number of steps of at least 0, and owner= and "
                "spec= where the value has none (a value of the batch, the target)"
            )
        for i in range(1, steps + 1):
            name = f"{value.name}_late" if i == 1 else f"{value.name}_{i}"
            held = self.state(owner, name, spec, initial, resize=resize, delays=True)
            self.assign(owner, held, value)
            value = held
        return value

    @contextmanager
    def repeat(self, name: str, times: int) -> Iterator[list[tuple[fx.Node, fx.Node]]]:
        """Make what is emitted inside a region, which a step runs `times` times.

        Yields a list to fill with (entry, exit) pairs: `entry = ir.emit(owner, carry, initial)` is `initial`
        in the first round, and in a later one what `exit` was in the round before, without a tape.

        Raises:
            GraphError: there is such a region, or `times` is less than one.
        """
        if name in self.repeats or times < 1:
            raise GraphError(f"region '{name}', {times} times: give a new name and a number of at least 1")
        outside, carried = set(self.graph.nodes), list[tuple[fx.Node, fx.Node]]()
        yield carried
        for node in self.graph.nodes:
            if node not in outside and node.op != "get_attr":
                node.meta["repeat"] = name
        self.repeats[name] = Repeat(name, times, tuple(carried))

    def apply_loss(self) -> fx.Node:
        """Apply the user's loss to the output, once; the node belongs to the last module."""
        if self.loss is None:
            self.loss = self.loss_of(self.last.name, self.output, name="loss")
        return self.loss

    def loss_of(self, owner: str, output: fx.Node, role: str = "loss", name: str | None = None) -> fx.Node:
        """Apply the user's loss to what stands for the model's output, in the owner's program."""
        return self.emit(
            owner, self.loss_function, output, self.target, role=role, name=name, spec=self.scalar
        )

    def replay(
        self,
        owner: str,
        inputs: dict[fx.Node, fx.Node],
        wanted: list[fx.Node],
        role: str,
        *,
        alike: bool = False,
        moves: bool = False,
    ) -> list[fx.Node]:
        """Run the owner's forward once more on other inputs.

        Args:
            owner: whose forward to run; its parameters are used live.
            inputs: boundary entry (or any value of the owner) -> what takes its place, of the same spec.
            wanted: nodes of the owner's forward whose new values are returned.
            role: the role of the new nodes.
            alike: what draws random numbers (dropout) draws those of the forward; else it draws others.
            moves: what runs moves buffers (BatchNorm's statistics) as the forward does, after it and in each
                round of a region; else they stay unchanged. One that the forward replaces by a new tensor
                stays.

        Raises:
            GraphError: the values asked for do not read one of `inputs`, or what takes its place has another
                spec.
        """
        changed = changers(self.graph)
        needed = self._between(owner, set(inputs), wanted, changed)
        self._check_replay(owner, inputs, needed | set(wanted))
        copies: dict[fx.Node, fx.Node] = dict(inputs)
        self._replays += 1
        run = 0 if moves else self._replays
        order = dependencies(self.graph, needed)
        position = {node: i for i, node in enumerate(order)}
        for node in nx.lexicographical_topological_sort(order, key=position.__getitem__):
            copies[node] = self._copy(node, copies, role, moves)
            copies[node].meta["replay"] = run, node
            if alike and draws(self.root, node):
                copies[node].meta["stream"] = node.meta.get("stream", node)
        return [copies.get(n, n) for n in wanted]

    def feed(self, owner: str, old: fx.Node, new: fx.Node) -> None:
        """Let the owner read `new` where it reads `old`, in training; what inference computes stays as it is.

        What `new` itself is computed from goes on reading `old`, and so does what is emitted later.

        Args:
            owner: whose program.
            old: an input of the model, the target, or a boundary entry of the owner.
            new: a value of the owner that a pass has emitted (read from a state, say), of the same spec.

        Raises:
            GraphError: `old` or `new` is none of these, or the specs differ.
        """
        specs = {n.meta["spec"] for n in (old, new) if n.meta.get("spec") is not None}
        given = old.op == "placeholder" or (old.meta["role"] == "boundary" and old.meta["owner"] == owner)
        made = new.meta["owner"] == owner and new.meta["role"] not in ("forward", "boundary")
        if not given or not made or len(specs) > 1:
            raise GraphError(
                f"pass '{self._making}' feeds '{owner}' with '{new.name}', {new.meta.get('spec')}, for "
                f"'{old.name}', {old.meta.get('spec')}; feed a value that a pass has emitted for the owner, "
                "for an input, the target or a boundary entry of it, of the same spec"
            )
        behind = [new]
        for node in behind:
            behind += [n for n in node.all_input_nodes if n not in behind]
        for user in [u for u in old.users if u.meta.get("owner") == owner and u not in behind]:
            user.replace_input_with(old, new)
        new.meta["feeds"] = old if old.op == "placeholder" else old.all_input_nodes[0]

    def copied(self, owner: str, node: fx.Node, follow: Callable[[fx.Node], fx.Node], role: str) -> fx.Node:
        """Add the operation of another owner's node to the owner's program.

        Args:
            owner: whose program.
            node: reads no parameter; a buffer is shared.
            follow: returns, for what the node reads, what the copy does.
            role: of the copy.
        """
        if node.op == "get_attr":
            return self.read(owner, str(node.target), role="buffer")
        args, kwargs = fx.map_arg(node.args, follow), fx.map_arg(node.kwargs, follow)
        return self._place(node.op, node.target, args, kwargs, owner, role, None, None)

    @staticmethod
    def _between(
        owner: str, entries: set[fx.Node], wanted: list[fx.Node], changed: dict[fx.Node, list[fx.Node]]
    ) -> set[fx.Node]:
        """Return what the owner computes between some values, changes in place included."""
        needed: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            fixed = node.op in ("get_attr", "placeholder") or node.meta["role"] == "boundary"
            if node in needed or node in entries or node.meta["owner"] != owner or fixed:
                continue
            needed.add(node)
            todo.extend((*node.all_input_nodes, *changed.get(node, ())))
        return needed

    def _check_replay(self, owner: str, inputs: dict[fx.Node, fx.Node], needed: set[fx.Node]) -> None:
        unread = [n.name for n in inputs if n not in needed and needed.isdisjoint(n.users)]
        if unread:
            raise GraphError(
                f"pass '{self._making}' replays '{owner}' with another {', '.join(unread)}, which the values "
                "asked for do not read; give what they read (ir.boundaries(consumer=...)), or ask for what "
                "reads it"
            )
        for node, other in inputs.items():
            old, new = node.meta.get("spec"), other.meta.get("spec")
            if None not in (old, new) and old != new:
                raise GraphError(
                    f"pass '{self._making}' replays '{owner}' with '{other.name}', {new}, in the place of "
                    f"'{node.name}', {old}; replay it on a value of the same shape and dtype; join or cut "
                    "batches before or after"
                )

    def _copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node], role: str, moves: bool) -> fx.Node:
        owner, spec = node.meta["owner"], node.meta.get("spec")
        for state in node.meta.get("mutates", ()):
            if state.op == "get_attr" and state not in copies and not moves:
                copies[state] = self.emit(owner, torch.clone, state, role=role)
                copies[state].meta["replay"] = self._replays, node

        def follow(n: fx.Node) -> fx.Node:
            return copies.get(n, n)

        op, target = node.op, node.target
        args, kwargs = fx.map_arg(node.args, follow), fx.map_arg(node.kwargs, follow)
        if op == "call_module" and not moves:
            module = owned_tensor(self.root, str(target))
            assert isinstance(module, nn.Module)
            if any(True for _ in module.buffers()):
                op, target = "call_function", ops.call_quietly
                args, kwargs = (self.read(owner, str(node.target), role="module"), args, kwargs), {}
        made = self._place(op, target, args, kwargs, owner, role, None, spec, infers=False)
        made.meta.update({k: node.meta[k] for k in _KEPT if k in node.meta})
        if "mutates" in node.meta:
            made.meta["mutates"] = tuple(follow(n) for n in node.meta["mutates"])
        return made

    def tidy(self) -> None:
        """Remove dead nodes and bring the graph into program order, grouped by owner."""
        self._drop_dead()
        end = self._end()
        for node in program_order(self.graph, self.owners):
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
            # A head waits for the pass that adds its loss.
            acts = node.meta.get("role") in ("forward", "head") or "mutates" in node.meta
            if pure and not acts and not node.users and node not in keep:
                self.graph.erase_node(node)

    def __str__(self) -> str:
        return render(self)
