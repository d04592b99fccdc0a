"""The phases that `fit` goes through, the sequential schedule's stages among them, and what each freezes."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from locc.errors import MethodError
from locc.ir import Owner, Phase, TrainingGraph, ops
from locc.ir.captured import strip
from locc.ir.view import node_modules
from locc.lower.tasks import needed_nodes


def stages(ir: TrainingGraph, name: str, sequential: bool) -> tuple[Phase, ...]:
    """Return the phases of training: the method's own, or under the sequential schedule those of its stages.

    A module has a stage of its own there, in forward order, in which it and its auxiliaries train; the
    method's phases, restricted to them, take turns within it.

    Raises:
        MethodError: a phase of the method `name` names no owner of the graph, has the name of another, or
            cannot freeze what it should; under the sequential schedule, a module is trained by means of a
            later one or not at all.
    """
    named = [phase.name for phase in ir.phases]
    for phase in ir.phases:
        if named.count(phase.name) > 1:
            raise MethodError(
                f"two phases of method '{name}' are called '{phase.name}'; give each its own name"
            )
        for owner in (*phase.trains, *(phase.frozen or ())):
            if owner not in ir.owners:
                raise MethodError(
                    f"phase '{phase.name}' of method '{name}' names '{owner}', which does not exist"
                )
    phases = tuple(p for m in ir.modules for p in _stage(ir, m, name)) if sequential else ir.phases
    for phase in phases:
        needed = needed_nodes(ir, frozenset(phase.trains))
        if sequential:
            _check_upward(ir, name, phase, needed)
        if phase.steps is not None and not needed.isdisjoint(ir.inputs):
            raise MethodError(
                f"phase '{phase.name}' of method '{name}' would make its steps without data, but what trains "
                "in it reads the model's inputs; give it passes over the data (epochs=), or other owners"
            )
        asked = "schedule='sequential'"
        if not sequential:
            asked = f"method '{name}' is undefined on this model: its phase '{phase.name}'"
        _check_freezable(ir, phase, needed, asked)
    return phases


def _stage(ir: TrainingGraph, module: Owner, name: str) -> list[Phase]:
    """Return the phases in which a module is trained to the end."""
    owners = [o.name for o in ir.owners.values() if o.index == module.index]
    earlier = [o.name for o in ir.owners.values() if o.index < module.index]
    if not any(ir.objectives(owner) for owner in owners):
        raise MethodError(f"schedule='sequential': method '{name}' gives module '{module.name}' no objective")
    own = 1 + max((p.stage for p in ir.phases), default=0)
    found = []
    for phase in ir.phases:
        trains = tuple(o for o in phase.trains if o in owners)
        if trains:
            frozen = None if phase.frozen is None else tuple(dict.fromkeys((*earlier, *phase.frozen)))
            stage = module.index * own + phase.stage
            named = f"{module.name}/{phase.name}"
            found.append(replace(phase, name=named, trains=trains, frozen=frozen, stage=stage))
    if all(p.warmup for p in ir.phases):
        found.append(Phase(module.name, tuple(owners), stage=module.index * own + own - 1))
    if not found:
        raise MethodError(f"schedule='sequential': no phase of method '{name}' trains module '{module.name}'")
    return found


def _check_upward(ir: TrainingGraph, name: str, phase: Phase, needed: set[fx.Node]) -> None:
    """Refuse the sequential schedule where a module's objective needs a later module."""
    index = max(ir.owners[o].index for o in phase.trains)
    for node in needed:
        owner = ir.owners.get(node.meta.get("owner", ""))
        if owner is not None and owner.index > index:
            raise MethodError(
                f"schedule='sequential' trains one module after the other, but method '{name}' needs "
                f"'{owner.name}' to train '{ir.modules[index].name}'; use schedule='lockstep'"
            )


def _check_freezable(ir: TrainingGraph, phase: Phase, needed: set[fx.Node], asked: str) -> None:
    """Refuse a phase where eval mode does not silence a frozen module, or silences one that trains."""
    frozen = phase.freezes(ir.owners)
    live = {
        id(module): str(node.meta["owner"])
        for node in needed
        if node.meta.get("owner") in phase.trains
        for module in node_modules(ir.root, node)
    }
    for node in (n for n in ir.nodes(role="forward") if n in needed and n.meta["owner"] in frozen):
        written = [strip(str(n.target)) for n in node.meta.get("mutates", ()) if n.op == "get_attr"]
        where = f"in '{node.name}'" + (f" ({node.meta['line']})" if node.meta.get("line") else "")
        freezes = f"{asked} freezes module '{node.meta['owner']}' in eval mode, but"
        random = node.meta.get("random")
        call = node.args[0] if node.target is ops.call_with else node
        assert isinstance(call, fx.Node)
        modules = node_modules(ir.root, call)
        if (random or written) and not modules:
            does, instead = (
                ("draws random numbers", "use nn.Dropout or F.dropout(x, p, self.training)")
                if random
                else (f"changes '{written[0]}'", "")
            )
            raise MethodError(
                f"{freezes} its forward {does} {where} whatever the mode; "
                f"{instead + ', or ' if instead else ''}keep that line inside a submodule that no split opens"
            )
        for module in modules:
            if id(module) in live and (random or any(True for _ in module.buffers())):
                raise MethodError(
                    f"{freezes} '{live[id(module)]}', which trains, calls the same submodule {where}; give "
                    f"each of them a {type(module).__name__} of its own"
                )
