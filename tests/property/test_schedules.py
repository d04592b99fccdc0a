"""Every order in which the tasks of a drawn program may run, and every place, ends as lock-step does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from locc import LoccError, Program, RunError
from locc.testing import Case
from property.test_programs import EXAMPLES, LONGER, drawn
from support import everything

BATCHES = 5


def ways(case: Case) -> list[dict[str, Any]]:
    """Three ways to train a case, drawn by its seed."""
    draw = random.Random(repr(case))
    wave = {"schedule": "wave", "batches": draw.randint(1, BATCHES)}
    every: list[dict[str, Any]] = [
        wave,
        wave | {"backend": "vmap"},
        {"schedule": "replay", "buffer": 0},
        {"schedule": "pipelined"},
        {"update": "in_backward"},
        {"recompute": True},
        {"offload": "disk"},
        {"recompute": True, "update": "in_backward", **wave},
        {"features": "memory", "schedule": "sequential"},
    ]
    return draw.sample(every, 3)


@drawn(EXAMPLES // 3)
def test_another_order_or_place_of_the_same_tasks_ends_with_the_same_bits(case: Case) -> None:
    case = replace(case, model=replace(case.model, dtype=torch.float64), schedule="lockstep")
    for way in ways(case):
        order = "sequential" if "features" in way else "lockstep"
        try:
            program = case.compile(verify=False, **way)
        except LoccError:
            continue  # refused, in a sentence
        one, other = (trained(case, p) for p in (case.compile(verify=False, schedule=order), program))
        if isinstance(one, str) or isinstance(other, str):
            assert isinstance(one, str) == isinstance(other, str), (way, one, other)  # both diverge, or none
            continue
        bits = {"rtol": 0, "atol": 0} if way.get("backend") != "vmap" else {"rtol": 1e-6, "atol": 1e-9}
        found = everything(other)
        for name, value in everything(one).items():
            if name != "header":  # it names the schedule
                torch.testing.assert_close(found[name], value, **bits, equal_nan=True, msg=f"{way}: {name}")


def trained(case: Case, program: Program) -> Program | str:
    """Train on some batches, one of another length where lengths may vary; return why it diverges."""
    more = [LONGER if case.dynamic and number == 2 else 0 for number in range(BATCHES)]
    batches = [case.batch(number, longer) for number, longer in enumerate(more)]
    try:
        program.fit(batches, 1, progress=False)
    except RunError as error:
        return str(error)
    return program
