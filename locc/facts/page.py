"""A certificate as a page of text, with everything that it knows of each owner."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from rich import filesize

from locc.facts.records import OwnerFacts
from locc.facts.statement import Statement
from locc.facts.traffic import Flow

WIDTH = 120


def page(certificate: Statement) -> list[str]:
    """Return the page: verdict, checks, the program's properties, then one block for each owner."""
    lines = [*_title(certificate), "", *_checks(certificate), "", *_program(certificate)]
    for owner in certificate.owners:
        lines += ["", *_owner(certificate, owner)]
    for heading, items in (("couplings", certificate.couplings), ("warnings", certificate.warnings)):
        lines += ["", heading, *([f"  {item}" for item in items] or ["  none"])]
    return [part for line in lines for part in wrapped(line)]


def _title(certificate: Statement) -> Iterator[str]:
    modules = sum(not o.auxiliary for o in certificate.owners)
    yield f"Certificate of locality: {certificate.method}, {modules} modules"
    yield f"  {certificate.verdict}"
    for reason in certificate.reasons:
        yield f"    {reason}"


def _checks(certificate: Statement) -> Iterator[str]:
    total = certificate.seconds
    yield "checks" if total is None else f"checks ({total:.2f} s)"
    for check in certificate.checks:
        took = "" if check.seconds is None else f"{check.seconds:6.3f} s  "
        yield f"  {check.name:<24} {check.status:<10} {took}{check.detail}"


def _program(certificate: Statement) -> Iterator[str]:
    table = certificate.table
    yield "program"
    yield f"  loss                      {certificate.loss}"
    yield f"  trains with               {certificate.training or 'optimizers that nobody has named'}"
    for phase in certificate.phases:
        yield f"  phase                     {phase}"
    yield f"  auxiliary model needed    {_yes(table.auxiliary_model)}"
    yield f"  whole forward pass needed {_yes(table.forward_pass)}"
    yield f"  backward pass needed      {table.backward_pass}"
    yield f"  pipeline-exact            {_yes(certificate.pipeline_exact)}: {certificate.pipeline_reason}"
    path = " > ".join(_folded(certificate.critical_path))
    yield f"  critical path             {len(certificate.critical_path)} module-steps: {path}"
    for name, how in certificate.gradients:
        yield f"  gradient value            {name}: {how}"
    yield f"  memory estimate           {_memory_line(certificate)}"
    yield f"  graph                     sha256 {certificate.graph_hash}"


def _memory_line(certificate: Statement) -> str:
    memory = certificate.memory
    if memory is None:
        return "none"
    return (
        f"peak {size(memory.peak)} of activations and gradients at a batch of {memory.batch}, in "
        f"'{memory.at}'; parameters {size(memory.parameters)}, optimizers {size(memory.optimizer)}"
    )


def size(count: int) -> str:
    """Return a number of bytes in words."""
    return filesize.decimal(count)


def wrapped(line: str) -> list[str]:
    """Return a line in pieces that fit into the width; what follows the first is indented further."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _folded(steps: Iterable[str]) -> Iterator[str]:
    last, count = "", 0
    for step in [*steps, ""]:
        if step != last:
            if last:
                yield last if count == 1 else f"{last} x{count}"
            last, count = step, 0
        count += 1


def _owner(certificate: Statement, owner: OwnerFacts) -> Iterator[str]:
    kind = f"auxiliary of module {owner.index}" if owner.auxiliary else f"module {owner.index}"
    yield f"{kind}: {owner.name}"
    yield (
        f"  owns      {_count(len(owner.parameters), 'parameter tensor')}, {owner.count:,} elements: "
        + _listed(owner.parameters)
    )
    if owner.frozen:
        yield "  frozen    all its parameters have requires_grad=False: it runs and passes on its value"
    if owner.networks:
        yield f"  runs      auxiliary networks {', '.join(owner.networks)}"
    for objective in owner.objectives:
        reach = _count(len(objective.reaches), "parameter tensor")
        yield f"  objective {objective.name} reaches {reach} of its own, none else"
        yield f"            by {', '.join(objective.proved_by)}"
    if not owner.objectives:
        yield "  objective none"
    for word, flows, end in (
        ("enters", certificate.entering(owner.name), "producer"),
        ("leaves", certificate.leaving(owner.name), "consumer"),
    ):
        for text in flow_lines(flows, end):
            yield f"  {word}    {text}"
    yield f"  locking   {locking_text(owner)}"
    if owner.peak_memory is not None:
        yield f"  memory    {size(owner.peak_memory)} at most while its code runs"


def flow_lines(flows: tuple[Flow, ...], end: str) -> Iterator[str]:
    """Yield a line for each value that passes, which names its other end ("producer" or "consumer")."""
    preposition = "from" if end == "producer" else "to"
    for flow in flows[:10]:
        other = flow.producer if end == "producer" else flow.consumer
        hops = f", through {_count(flow.hops, 'module')}" if flow.hops else ""
        spec = f" {flow.spec}" if flow.spec else ""
        way = f" ({flow.direction})" if other != "data" else ""
        late = f", {_count(flow.staleness, 'step')} old" if flow.staleness else ""
        yield f"{flow.kind} {flow.value}{spec} {preposition} {other}{way}{hops}{late}"
    if len(flows) > 10:
        yield f"and {len(flows) - 10} more"


def locking_text(owner: OwnerFacts) -> str:
    """Return what an owner's update waits for."""
    backward = "no"
    if owner.backward_locked:
        backward = f"yes, waits for {_listed(owner.backward_waits_for, 4)}"
        backward += f" (a chain of {owner.backward_depth})" if owner.backward_depth > 1 else " (one hop)"
    update = f"yes, waits for {_listed(owner.update_waits_for, 4)}" if owner.update_locked else "no"
    earlier = [o for o in owner.depends_on if o not in owner.update_waits_for]
    late = f"; trains on values of earlier steps of {_listed(earlier, 4)}" if earlier else ""
    return f"forward: {_yes(owner.forward_locked)}; update: {update}; backward: {backward}{late}"


def _listed(items: Iterable[str], most: int = 6) -> str:
    names = list(items)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
