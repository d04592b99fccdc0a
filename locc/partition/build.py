"""From the captured forward and the cuts to a training graph with owners and boundaries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from locc.errors import SplitError
from locc.ir import ops
from locc.ir.captured import Captured, Root, owned_tensor, strip
from locc.ir.coupling import Coupling
from locc.ir.graph import TrainingGraph
from locc.ir.spec import TensorSpec
from locc.ir.view import DATA, Owner, node_parameters
from locc.markers import split as marker
from locc.partition.mutation import changed_by, check_in_place
from locc.partition.owners import assign
from locc.partition.splits import Cut
from locc.partition.tied import TiedPolicy

Loss = Callable[[Any, Any], torch.Tensor]


def partition(captured: Captured, cuts: Sequence[Cut], loss: Loss, tied: TiedPolicy) -> TrainingGraph:
    """Cut the captured forward into modules.

    Values that need no parameter, no random number and no changing state (masks, position tables)
    are recomputed by each module that reads them; every other value that crosses a cut gets a
    `stop_gradient` of role "boundary" in each module that reads it, wherever it was made.

    Raises:
        SplitError: see `locc.partition.owners.assign`; or a tied parameter without a policy; or a
            module changes in place a value that another module reads.
    """
    free = _free(captured.root, captured.training)
    indices, ordered = assign(captured.root, captured.training, cuts, free)
    names = _names(captured, indices, ordered)
    check_in_place(captured.training, indices, names)
    owners = {name: Owner(name, i) for i, name in enumerate(names)}
    shared = tied.decide(captured.root, captured.training, indices, names)
    builder = _Builder(captured, names, indices, shared, free)
    ir = builder.build(owners, loss)
    ir.couplings += tied.copies
    captured.notes += tied.notes
    ir.inference = _inference(captured, ordered, names)
    ir.tidy()
    return ir


def _names(captured: Captured, indices: dict[fx.Node, int], cuts: Sequence[Cut]) -> list[str]:
    """Name each module after the split that ends it, the last one after the submodule it consists of."""
    names = [cut.name if cut.name != DATA else f"{DATA}_" for cut in cuts]
    last = [n for n, k in indices.items() if k == len(cuts)]
    called = {
        strip(str(n.target)) for n in last if n.op == "call_module" and node_parameters(captured.root, n)
    }
    name = called.pop() if len(called) == 1 else "output"
    if name == "the model":
        name = "model"
    while name in names:
        name += "_"
    return [*names, name]


class _Builder:
    def __init__(
        self,
        captured: Captured,
        names: list[str],
        indices: dict[fx.Node, int],
        shared: dict[int, int],
        free: set[fx.Node],
    ) -> None:
        self.captured, self.names, self.indices, self.shared = captured, names, indices, shared
        self.graph = fx.Graph()
        self.made: dict[tuple[fx.Node, str], fx.Node] = {}
        self.free = free
        self.couplings: list[Coupling] = []

    def build(self, owners: dict[str, Owner], loss: Loss) -> TrainingGraph:
        inputs: list[fx.Node] = []
        source = self.captured.training
        for node in source.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(str(node.target))
                new.meta.update(owner=DATA, role="input", made_by="capture", spec=node.meta.get("spec"))
                self.made[node, DATA] = new
                inputs.append(new)
        target = self.graph.placeholder("target")
        target.meta.update(owner=DATA, role="target", made_by="partition", spec=None)
        last = self.names[-1]
        for node in source.nodes:
            if node in self.indices and node not in self.free and node.op != "get_attr":
                self._copy(node, self.names[self.indices[node]])
        end = next(iter(reversed(source.nodes)))
        flat = list(end.args[0])
        values = [self._fetch(v, last) if isinstance(v, fx.Node) else v for v in flat]
        output = self._output(values, last)
        self.graph.output(output)
        prediction = self._prediction(values)
        if prediction is None:
            raise SplitError("the model returns no floating-point tensor to train on")
        return TrainingGraph(
            root=self.captured.root,
            graph=self.graph,
            inference=fx.Graph(),
            captured=self.captured,
            owners=owners,
            inputs=tuple(inputs),
            target=target,
            output=output,
            prediction=prediction,
            loss_function=loss,
            couplings=self.couplings,
        )

    def _output(self, values: list[Any], owner: str) -> fx.Node:
        rebuild = self.captured.output
        if len(values) == 1 and isinstance(values[0], fx.Node) and rebuild.build(values) is values[0]:
            return values[0]
        node = self.graph.call_function(rebuild, tuple(values))
        node.meta.update(owner=owner, role="output", made_by="partition", spec=None)
        return node

    def _prediction(self, values: list[Any]) -> fx.Node | None:
        """Return the value called `logits`, or the first one with a gradient that is no single number."""
        structure = self.captured.output.build(list(range(len(values))))
        named = (
            structure.get("logits") if isinstance(structure, Mapping) else getattr(structure, "logits", None)
        )
        candidates = [values[named]] if isinstance(named, int) else values
        return next((v for v in candidates if _is_float(v) and v.meta["spec"].shape), None)

    def _copy(self, node: fx.Node, owner: str) -> fx.Node:
        def follow(n: fx.Node) -> fx.Node:
            return self._fetch(n, owner)

        if node.target is marker:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self.made[node, owner] = self._fetch(source, owner)
            return self.made[node, owner]
        args, kwargs = fx.map_arg(node.args, follow), fx.map_arg(node.kwargs, follow)
        foreign = self._foreign(node)
        if foreign:
            made = self._call_with(node, owner, foreign, args, kwargs)
        else:
            made = self.graph.create_node(node.op, node.target, args, kwargs, _short(node.name))
        made.meta.update({k: v for k, v in node.meta.items() if k not in ("mutates", "val")})
        made.meta.update(owner=owner, role="forward", made_by="capture")
        if "mutates" in node.meta:
            known = ((n, owner if n.op != "placeholder" else DATA) for n in node.meta["mutates"])
            made.meta["mutates"] = tuple(self.made[key] for key in known if key in self.made)
        self.made[node, owner] = made
        return made

    def _fetch(self, node: fx.Node, owner: str) -> fx.Node:
        """Return the node's value as `owner` may read it."""
        if (node, owner) in self.made:
            return self.made[node, owner]
        if node.op == "placeholder":
            return self.made[node, DATA]
        if node.op == "get_attr":
            return self._read(node, owner)
        if node in self.free:
            return self._copy(node, owner)
        producer = self.names[self.indices[node]]
        if producer == owner:
            raise SplitError(f"'{node.name}' is used before it is computed")
        return self._cross(node, self.made[node, producer], producer, owner)

    def _cross(self, node: fx.Node, value: fx.Node, producer: str, owner: str) -> fx.Node:
        spec = node.meta.get("spec")
        if not isinstance(spec, TensorSpec):
            raise SplitError(
                f"'{node.name}' passes from module '{producer}' to '{owner}' but is not a tensor; split"
                " elsewhere"
            )
        entry = self._entry(value, owner, spec)
        used = entry
        if changed_by(self.captured.training, node, self.names.index(owner), self.indices):
            # stop_gradient shares storage: without a copy the consumer would overwrite the producer's tape.
            used = self.graph.create_node("call_function", torch.clone, (entry,), {}, f"{entry.name}_copy")
            used.meta.update(owner=owner, role="copy", made_by="partition", spec=spec)
        self.made[node, owner] = used
        return used

    def _entry(self, value: fx.Node, owner: str, spec: TensorSpec) -> fx.Node:
        name = f"{value.name}_at_{owner}"
        entry = self.graph.create_node("call_function", ops.stop_gradient, (value,), {}, name)
        entry.meta.update(owner=owner, role="boundary", made_by="partition", spec=spec)
        return entry

    def _read(self, node: fx.Node, owner: str) -> fx.Node:
        new = self.graph.get_attr(str(node.target))
        new.meta.update(node.meta)
        new.meta.update(owner=owner, role="parameter", made_by="capture")
        held = owned_tensor(self.captured.root, str(node.target))
        home = self.shared.get(id(held))
        if home is not None and self.names[home] != owner:
            new = self._foreign_entry(str(node.target), home, owner)
        self.made[node, owner] = new
        return new

    def _foreign(self, node: fx.Node) -> dict[str, tuple[str, int]]:
        """Return the parameters of a leaf call that another module owns: name -> (path, owner index)."""
        if node.op != "call_module" or not self.shared:
            return {}
        here = self.indices[node]
        base = str(node.target)
        return {
            path.removeprefix(f"{base}."): (path, self.shared[id(p)])
            for path, p in node_parameters(self.captured.root, node)
            if self.shared.get(id(p), here) != here
        }

    def _call_with(
        self, node: fx.Node, owner: str, foreign: dict[str, tuple[str, int]], args: Any, kwargs: Any
    ) -> fx.Node:
        holder = self.graph.get_attr(str(node.target))
        holder.meta.update(owner=owner, role="module", made_by="partition", spec=None)
        tensors = {name: self._foreign_entry(path, home, owner) for name, (path, home) in foreign.items()}
        return self.graph.call_function(ops.call_with, (holder, tensors, args, kwargs))

    def _foreign_entry(self, path: str, home: int, owner: str) -> fx.Node:
        key = (path, self.names[home])
        value = next((n for n in self.graph.nodes if n.meta.get("tied") == key), None)
        tensor = owned_tensor(self.captured.root, path)
        assert isinstance(tensor, torch.Tensor)
        spec = TensorSpec.of(tensor)
        if value is None:
            value = self.graph.get_attr(path)
            value.meta.update(
                owner=self.names[home], role="parameter", made_by="partition", spec=spec, tied=key
            )
        for user in value.users:
            if user.meta["owner"] == owner:
                return user
        entry = self._entry(value, owner, spec)
        entry.meta["tied"] = key
        text = f"'{owner}' uses parameter '{strip(path)}', which '{self.names[home]}' owns and trains"
        self.couplings.append(Coupling(strip(path), (self.names[home], owner), text))
        return entry


def _short(name: str) -> str:
    short = name.removeprefix("model_")
    return short if short.isidentifier() else f"layer_{short}"


def _is_float(value: Any) -> bool:
    spec = value.meta.get("spec") if isinstance(value, fx.Node) else None
    return isinstance(spec, TensorSpec) and spec.differentiable


def _free(root: Root, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that any module may recompute for itself."""
    free: set[fx.Node] = set()
    touched = {
        m for n in graph.nodes for m in (*n.meta.get("mutates", ()), *((n,) if "mutates" in n.meta else ()))
    }
    for node in graph.nodes:
        if node in touched or node.meta.get("random") or node.op == "output":
            continue
        if node.op == "get_attr":
            held = owned_tensor(root, str(node.target))
            if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter):
                free.add(node)
        elif node.op == "call_module":
            module = owned_tensor(root, str(node.target))
            assert isinstance(module, nn.Module)
            stateless = not any(True for _ in module.parameters()) and not node.meta.get("stateful", True)
            if stateless and all(n in free or n.op == "placeholder" for n in node.all_input_nodes):
                free.add(node)
        elif node.op != "placeholder" and all(
            n in free or n.op == "placeholder" for n in node.all_input_nodes
        ):
            free.add(node)
    return {n for n in free if n.op != "get_attr"}


def _inference(captured: Captured, cuts: Sequence[Cut], names: Sequence[str]) -> fx.Graph:
    """Return a copy of the eval-mode forward whose nodes have owners."""
    free = _free(captured.root, captured.inference)
    indices, _ = assign(captured.root, captured.inference, cuts, free)
    for node in captured.inference.nodes:
        node.meta["index"] = indices.get(node)
    graph = copy.deepcopy(captured.inference)
    copies = dict(zip(captured.inference.nodes, graph.nodes, strict=True))
    for node in graph.nodes:
        if "mutates" in node.meta:
            node.meta["mutates"] = tuple(copies[n] for n in node.meta["mutates"])
        index = node.meta.pop("index")
        owner = DATA if index is None else names[index]
        node.meta.update(owner=owner, role="forward", made_by="capture")
    return graph
