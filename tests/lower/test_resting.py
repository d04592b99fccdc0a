"""What of a phase's step depends on the batch alone, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc import Program
from locc.facts.traffic import couplings
from locc.ir import Phase, TrainingGraph
from locc.lower import Resting, at_rest
from rules import written
from runtime.turns import Probing, norms
from support import Residual, Tied, compiled, mlp


def cut(program: Program, phase: str) -> Resting | str | None:
    (found,) = (p for p in program.phases if p.name == phase)
    return at_rest(program.ir, program.plan(phase), found, couplings(program.ir, None))


def test_a_stage_is_cut_where_what_trains_reads_what_rests():
    program = compiled(Residual(), "dgl", ["inp", "blocks.0", "blocks.1"], schedule="sequential")
    assert cut(program, "inp") is None
    found = cut(program, "blocks.1")
    assert isinstance(found, Resting)
    assert str(found.first).splitlines() == [
        "inp: forward (no tape) -> inp  free x",
        "inp: send inp to blocks.1",
        "blocks.0: forward (no tape) -> blocks_0  free inp",
        "blocks.0: send blocks_0 to blocks.1  free blocks_0",
    ]
    assert found.first.trains == ()
    assert found.then.trains == ("blocks.1",)
    assert [i.value for i in found.sent] == ["inp", "blocks_0"]
    rests = {id(p) for name in ("inp", "blocks.0") for p in program.model.get_submodule(name).parameters()}
    assert {id(t) for t in found.tensors} == rests


def _derived(ir: TrainingGraph) -> None:
    """The last module trains on a derivative that the one below it computes at rest."""
    (boundary,) = ir.boundaries(consumer="relu2")
    (value,) = ir.outputs("relu2")
    _reads(ir, ir.gradient(ir.emit("relu2", torch.sum, value, spec=ir.scalar), boundary.entry))


def _drawn(ir: TrainingGraph) -> None:
    """The last module trains on what the first one draws at rest."""
    _reads(ir, ir.emit("relu1", functional.dropout, *ir.outputs("relu1")))


def _watched(ir: TrainingGraph) -> None:
    """An auxiliary trains on the output and the target; the loss is there to be reported."""
    probe = ir.add_owner("probe", ir.last).name
    guess = ir.call(probe, ir.add_module("probe", nn.Linear(3, 3)), ir.stop_gradient(probe, ir.output))
    ir.objective(probe, ir.emit(probe, functional.cross_entropy, guess, ir.target, spec=ir.scalar), "guess")
    ir.phases = (Phase("probe", (probe,)),)


def _reads(ir: TrainingGraph, value: fx.Node) -> None:
    error = ir.emit("third", _distance, ir.output, ir.stop_gradient("third", value))
    ir.objective("third", error, "distance")
    ir.phases = (Phase("last", ("third",)),)


def _distance(output: Tensor, value: Tensor) -> Tensor:
    return (output.sum(1) - value.sum(1)).square().mean()


CASES: dict[str, tuple[Callable[[], Program], str, str]] = {
    "state": (
        lambda: compiled(norms(), Probing(), ["a", "b"]),
        "probes",
        "'a', at rest, keeps 'a_trace' from step to step",
    ),
    "what trains": (
        lambda: compiled(mlp(), "tp", ["relu1", "relu2"], loss="cross_entropy"),
        "forward",
        "'relu2.inverse', at rest, depends on 'relu2', which is not",
    ),
    "a tied parameter": (
        lambda: compiled(
            Tied(),
            "dgl",
            ["embed", "mid"],
            schedule="sequential",
            tied="owner",
            example_inputs=torch.randint(11, (4, 5)),
        ),
        "head",
        "'embed', at rest, depends on 'head', which is not",
    ),
    "a derivative": (
        lambda: compiled(mlp(), written(_derived), ["relu1", "relu2"]),
        "last",
        "relu1 rests",
    ),
    "a loss that is reported": (
        lambda: compiled(mlp(), written(_watched), ["relu1", "relu2"]),
        "probe",
        "relu1 and relu2 rests",
    ),
    "chance": (
        lambda: compiled(mlp(), written(_drawn), ["relu1", "relu2"]),
        "last",
        "'relu1', at rest, draws random numbers in 'compute'",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_what_depends_on_more_than_the_batch_does_not_rest(what):
    make, phase, why = CASES[what]
    program = make()
    found: Any = cut(program, phase)
    if isinstance(found, Resting):
        found = " and ".join(found.first.runs) + " rests"
    assert found == why
