"""Runs the checks, and has what they saw written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import optim

from locc import files
from locc.errors import LoccError
from locc.facts import Certificate
from locc.ir import Inputs, TrainingGraph
from locc.lower import Plan
from locc.proof import sentinel, static, storage, walk
from locc.proof.account import Evidence, certificate
from locc.proof.experiment.batch import Batch, small_batch, standing_in, whole_batch
from locc.proof.experiment.runner import plans_of
from locc.proof.experiment.worlds import reason
from locc.proof.findings import REACHABILITY, SENTINEL, STORAGE, WALK, refuse
from locc.proof.memory import estimate
from locc.quiet import attempting
from locc.runtime import Compiled, Learner, checked
from locc.snapshot import preserved

_FEW_PARAMETERS = 1 << 24
_FEW_OPERATIONS = 1e10
"""Up to so many parameters, and operations in a small step, the sentinel runs on real tensors."""


def prove(
    ir: TrainingGraph,
    name: str,
    learners: Mapping[str, Learner],
    inputs: Inputs,
    target: Any = None,
    real: bool | None = None,
    training: str = "",
    advice: Iterable[str] = (),
) -> Certificate:
    """Run every check on a training graph and return the certificate.

    Args:
        ir: the graph; it, the model and the optimizers are bit for bit as they were afterwards.
        name: the method's id, for the title.
        learners: the optimizer of each owner that trains.
        inputs: example inputs; a small batch is cut from them.
        target: the target of these inputs; without one, a target that the loss accepts is made up.
        real: whether the sentinel runs on real tensors; None: where two small steps cost little.
        training: by which optimizers the program trains, to be stated.
        advice: why it may train badly, to be listed among the warnings.

    Raises:
        LocalityError: a gradient or a state change crosses a module boundary.
    """
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    seen = Evidence(training=training, warnings=list(advice))
    _static(ir, name, learners, seen)
    with preserved(ir.root, values=False), attempting():
        if not ir.root.model.training:
            ir.root.train()
        with seen.timed():
            batch = small_batch(ir, inputs, target)
        with standing_in(ir, batch.stand_in):
            plans = plans_of(ir)
            _walk(ir, name, plans, batch, seen)
            operations = _weigh(ir, plans, optimizers, whole_batch(ir, inputs, batch), seen)
            small = _parameters(ir) <= _FEW_PARAMETERS and operations * batch.size <= _FEW_OPERATIONS
            _sentinel(ir, name, plans, optimizers, batch, small if real is None else real, seen)
    if batch.stand_in:
        seen.warnings.append(
            f"{batch.text}: the loss was replaced by a sum over the outputs in the autograd walk and the "
            "sentinel run, so the loss function itself was not examined; call locc.verify(program, x, y) "
            "with a batch of your own"
        )
    return certificate(ir, name, batch, seen)


def verify(program: Compiled, x: Any = None, y: Any = None, *, real: bool | None = None) -> Certificate:
    """Prove a live program local, from the beginning.

    Args:
        program: a compiled program; its state is bit for bit as it was afterwards.
        x: a batch as `step` takes it; the example inputs of the compilation without one.
        y: its target; made up without one.
        real: True has the sentinel train two steps on real tensors whatever they cost, False on shapes
            alone where the program runs so. The default is True up to 16 million parameters and ten
            billion operations in a small step, and False beyond and with `offload=`.

    Returns:
        The certificate, which `program.certificate` returns from then on.

    Raises:
        LocalityError: a gradient or a state change crosses a module boundary.
        LoccError: there is nothing to run the program on.
    """
    checked(program)
    if x is not None:
        program.complete(x)
    ir = program.ir
    inputs = Inputs.of(program.model, x) if x is not None else ir.captured.example
    if inputs is None:
        raise LoccError("the program keeps no example inputs; call locc.verify(program, x) with a batch")
    built, place = program.built, program.settings.files
    real = False if real is None and place is not None else real
    with files.keeping(place):
        proved = prove(ir, program.method, built.learners, inputs, y, real, built.training, built.advice)
    built.certificate = proved
    return proved


def _static(ir: TrainingGraph, name: str, learners: Mapping[str, Learner], seen: Evidence) -> None:
    optimizers = {owner: learner.optimizer for owner, learner in learners.items()}
    with seen.timed():
        refuse(name, static.check(ir))
        objectives, edges = len(ir.objectives()), sum(len(n.all_input_nodes) for n in ir.graph.nodes)
        seen.note(REACHABILITY, f"{objectives} objectives, {edges} edges")
    with seen.timed():
        refuse(name, storage.check(ir, learners))
        held = sum(len(storage.held_by(o)) for o in optimizers.values())
        seen.note(STORAGE, f"{len(optimizers)} optimizers, {held} parameter tensors, no memory in common")


def _walk(ir: TrainingGraph, name: str, plans: list[Plan], batch: Batch, seen: Evidence) -> None:
    try:
        found = walk.check(ir, batch, plans)
    except Exception as error:  # the model does not run on a made-up batch: say so, do not guess
        _incomplete(seen, WALK, f"{type(error).__name__}: {error}")
        return
    refuse(name, found.findings)
    seen.walk = found
    text = f"{found.how}, {walk.STEPS} steps, batch of {batch.size}, target: {batch.text}"
    seen.note(WALK, text, "partial" if batch.stand_in else "held")
    seen.warnings += [
        f"a tensor {stranger} requires a gradient and is no parameter of the program; nothing trains it"
        for stranger in found.strangers
    ]


def _weigh(
    ir: TrainingGraph,
    plans: list[Plan],
    optimizers: dict[str, optim.Optimizer],
    batch: Batch,
    seen: Evidence,
) -> float:
    """Estimate the memory of a step on the example inputs; return its operations for each sample."""
    with seen.timed():
        try:
            found = estimate(ir, optimizers, batch, plans)
        except Exception as error:
            seen.warnings.append(
                "peak memory could not be estimated, since a step does not run on shapes alone: "
                f"{reason(error)}"
            )
            return 0.0
    seen.memory = found.memory
    return found.operations / max(batch.size, 1)


def _parameters(ir: TrainingGraph) -> int:
    return sum(t.numel() for t in (*ir.root.parameters(), *ir.root.buffers()))


def _sentinel(
    ir: TrainingGraph,
    name: str,
    plans: list[Plan],
    optimizers: dict[str, optim.Optimizer],
    batch: Batch,
    real: bool,
    seen: Evidence,
) -> None:
    with seen.timed():
        try:
            found = sentinel.check(ir, optimizers, batch, plans, real)
        except Exception as error:
            _incomplete(seen, SENTINEL, f"{type(error).__name__}: {error}")
            return
        refuse(name, found.findings)
        if found.failure is not None:
            _incomplete(seen, SENTINEL, found.failure)
            return
        seen.sentinel = found
        text = f"{found.how}, {sentinel.STEPS} steps, batch of {batch.size}, state restored"
        seen.note(SENTINEL, text, "partial" if batch.stand_in else "held")


def _incomplete(seen: Evidence, name: str, reason: str) -> None:
    first = (reason.strip().splitlines() or [""])[0][:240]
    seen.note(name, first, "incomplete")
    seen.warnings.append(
        f"the {name} could not be completed, so it proves nothing: {first}; call "
        "locc.verify(program, x, y) with a batch of your own"
    )
