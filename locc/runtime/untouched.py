"""Leaves a program as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from locc import files
from locc.runtime.program import Compiled
from locc.snapshot import preserved


@contextmanager
def untouched(program: Compiled) -> Iterator[None]:
    """Leave a program bit for bit as it was; inside, it is ready for steps that continue its training.

    What user code keeps outside of the program (a global, a closure) is out of reach.
    """
    built = program.built
    certificate = built.certificate
    gradients = [(p, p.grad) for p in program.parameters() if p.grad is not None]
    waiting = [(learner, learner.pending, learner.skip) for learner in built.learners.values()]
    with files.keeping(program.settings.files), preserved(program, program.optimizers.values()):
        for parameter, gradient in gradients:  # half-accumulated ones are part of the state
            parameter.grad = files.copy(gradient)
        if not (program.training and program.model.training):
            program.train()
        try:
            yield
        finally:
            built.certificate = certificate
            for learner, pending, skip in waiting:
                learner.pending, learner.skip = pending, skip
