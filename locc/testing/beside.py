"""Runs the programs that a plan is cut into side by side, in threads of this process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from locc.lower import ModuleProgram, Receive, Send
from locc.program import Program
from locc.runtime import StepReport
from locc.runtime.backends import BACKENDS
from locc.runtime.streams import preserved_rng

from .trial import twin


class StoppedError(Exception):
    """Another program has failed, or no program sends what this one waits for."""


class Mailbox:
    """One queue for each value and each program that receives it, and whose turn it is.

    One program runs at a time, until it waits for a value that has not come; then the next in the order of
    the model that can go on. So a program is as far ahead of those that it sends to as it can be, which
    shows what it may not change any more, and every run is the same.
    """

    def __init__(self, programs: Mapping[str, ModuleProgram]) -> None:
        self.homes = {owner: p.name for p in programs.values() for owner in p.owners}
        self.queues: dict[tuple[str, str], deque[Any]] = {}
        self.waits: dict[str, tuple[str, str] | None] = dict.fromkeys(programs)
        self.turn: str | None = next(iter(programs), None)
        self.changed = threading.Condition()

    def send(self, instruction: Send, value: Any) -> None:
        """Put a value into the queue of each program that reads it."""
        for home in dict.fromkeys(self.homes[owner] for owner in instruction.to):
            self.queues.setdefault((instruction.value, home), deque()).append(value)

    def receive(self, instruction: Receive) -> Any:
        """Take the next value; where there is none yet, let the others run.

        Raises:
            StoppedError: none will come.
        """
        home = self.homes[instruction.owner]
        key = instruction.value, home
        self.waits[home] = key
        if not self.queues.get(key):
            self.next()
            self.wait(home)
        self.waits[home] = None
        if not self.queues.get(key):
            raise StoppedError(f"'{instruction.value}' of '{instruction.source}' never came")
        return self.queues[key].popleft()

    def next(self) -> None:
        """Give the turn to the first program that can go on, or to one that waits in vain."""
        ready = [name for name, key in self.waits.items() if key is None or self.queues.get(key)]
        with self.changed:
            self.turn = next(iter(ready or self.waits), None)
            self.changed.notify_all()

    def wait(self, name: str) -> None:
        """Wait for a program's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == name)

    def leave(self, name: str) -> None:
        """End a program."""
        del self.waits[name]
        self.next()


def run_beside(
    program: Program, batches: list[list[Any]], programs: Mapping[str, ModuleProgram] | None = None
) -> list[StepReport]:
    """Train on batches with one thread for each module's program; returns what each step reports.

    Args:
        program: a compiled program.
        batches: of the plan's inputs.
        programs: others than `program.module_programs`.

    Raises:
        AssertionError: a program fails, waits for what never comes, or sends what nobody receives.
    """
    programs = program.module_programs if programs is None else programs
    mailbox = Mailbox(programs)
    objectives: list[dict[str, Tensor]] = [{} for _ in batches]
    losses: list[Tensor | None] = [None for _ in batches]
    errors: dict[str, BaseException] = {}

    def work(name: str) -> None:
        context = replace(program.built.executor, observe=None, flags=[])
        plan = programs[name].plan
        mailbox.wait(name)
        try:
            for number, batch in enumerate(batches):
                machine = BACKENDS[context.backend](
                    context, plan, twin(batch), program.steps + number, mailbox
                )
                machine.run(plan.instructions)
                objectives[number].update(machine.objectives)
                losses[number] = machine.loss if machine.loss is not None else losses[number]
        except BaseException as error:  # told to the caller, in whose thread an assertion belongs
            errors[name] = error
        finally:
            mailbox.leave(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in programs]
    with preserved_rng(program.device):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Programs that wait in vain are named only where no other fails, and then all of them.
    failed = {n: e for n, e in errors.items() if not isinstance(e, StoppedError)} or errors
    if failed:
        found = "; ".join(f"the program of module '{n}' fails: {e}" for n, e in failed.items())
        raise AssertionError(found) from next(iter(failed.values()))
    left = [
        f"'{value}' to the program of '{home}'" for (value, home), queue in mailbox.queues.items() if queue
    ]
    if left:
        raise AssertionError(f"the programs send {', '.join(left)}, which it never receives")
    return [StepReport(found, loss) for found, loss in zip(objectives, losses, strict=True)]
