"""The sequential schedule: each module is trained to the end, then frozen in eval mode."""

from __future__ import annotations

from locc.errors import MethodError
from locc.ir import Phase, TrainingGraph
from locc.lower.tasks import analyse


def stages(ir: TrainingGraph, name: str) -> tuple[Phase, ...]:
    """Return one phase for each module, in forward order, in which it and its auxiliaries train.

    Raises:
        MethodError: the method `name` trains a module by means of a later one, or a module could not be
            frozen.
    """
    _check_upward(ir, name)
    _check_freezable(ir)
    return tuple(
        Phase(m.name, tuple(o.name for o in ir.owners.values() if o.index == m.index)) for m in ir.modules
    )


def _check_upward(ir: TrainingGraph, name: str) -> None:
    """Refuse the sequential schedule where a module's objective needs a later module."""
    for module in ir.modules:
        trains = frozenset(o.name for o in ir.owners.values() if o.index == module.index)
        if not any(ir.objectives(owner) for owner in trains):
            raise MethodError(
                f"schedule='sequential': method '{name}' gives module '{module.name}' no objective"
            )
        for node in analyse(ir, trains).needed:
            owner = ir.owners.get(node.meta.get("owner", ""))
            if owner is not None and owner.index > module.index:
                raise MethodError(
                    f"schedule='sequential' trains one module after the other, but method '{name}' needs "
                    f"'{owner.name}' to train '{module.name}'; use schedule='lockstep'"
                )


def _check_freezable(ir: TrainingGraph) -> None:
    """Refuse the sequential schedule where eval mode would not silence a frozen module's dropout."""
    for node in ir.nodes(role="forward"):
        if node.meta.get("random") and node.op != "call_module" and node.meta["owner"] != ir.last.name:
            where = f" ({node.meta['line']})" if node.meta.get("line") else ""
            raise MethodError(
                f"schedule='sequential' freezes module '{node.meta['owner']}' in eval mode, but its forward "
                f"draws random numbers in '{node.name}'{where} whatever the mode; use nn.Dropout, or keep "
                "that line inside a submodule that no split opens"
            )
