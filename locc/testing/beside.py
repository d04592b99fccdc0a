"""Runs the programs that a plan is cut into side by side, in threads of this process."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from locc.lower import ModuleProgram, Receive, Send
from locc.program import Program
from locc.runtime.backends import BACKENDS
from locc.runtime.streams import preserved_rng

from .trial import twin


class StoppedError(Exception):
    """What a program waits for will never come."""


class Mailbox:
    """A queue for each value and each program that receives it.

    Args:
        homes: owner -> name of the program that it is in.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self.homes = homes
        self.running = set(homes.values())
        self.waiting: dict[str, tuple[str, str]] = {}
        self.sent: defaultdict[tuple[str, str], deque[Any]] = defaultdict(deque)
        self.changed = threading.Condition()

    def send(self, instruction: Send, value: Any) -> None:
        """Put a value into the queue of each program that reads it."""
        with self.changed:
            for home in dict.fromkeys(self.homes[owner] for owner in instruction.to):
                self.sent[instruction.value, home].append(value)
            self.changed.notify_all()

    def receive(self, instruction: Receive) -> Any:
        """Take the next value.

        Raises:
            StoppedError: no program is left that could send it.
        """
        home = self.homes[instruction.owner]
        key = instruction.value, home
        with self.changed:
            self.waiting[home] = key
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.sent[key] or self._stuck())
            if not self.sent[key]:
                raise StoppedError(f"'{instruction.value}' of '{instruction.source}' never came")
            del self.waiting[home]
            return self.sent[key].popleft()

    def leave(self, home: str) -> None:
        """Note that a program has ended."""
        with self.changed:
            self.running.discard(home)
            self.changed.notify_all()

    def _stuck(self) -> bool:
        """Whether every program that still runs waits for what has not been sent."""
        return all(home in self.waiting and not self.sent[self.waiting[home]] for home in self.running)


def run_beside(
    program: Program, batches: list[list[Any]], programs: Mapping[str, ModuleProgram] | None = None
) -> list[dict[str, Tensor]]:
    """Train on batches with a thread for each module's program; returns the objectives of each step.

    Args:
        program: whose optimizers and random streams to use.
        batches: the values of the plan's inputs, a list for each step.
        programs: others than `program.module_programs`.

    Raises:
        AssertionError: a program fails, waits for what never comes, or sends what nobody receives.
    """
    programs = program.module_programs if programs is None else programs
    mailbox = Mailbox({owner: name for name, p in programs.items() for owner in p.owners})
    turn = threading.Lock()  # for each instruction: PyTorch has one random generator a process
    done: list[dict[str, Tensor]] = [{} for _ in batches]
    errors: dict[str, BaseException] = {}

    def work(name: str) -> None:
        context = replace(program.built.executor, turn=turn, observe=None, flags=[])
        plan = programs[name].plan
        try:
            for number, batch in enumerate(batches):
                machine = BACKENDS[context.backend](
                    context, plan, twin(batch), program.steps + number, mailbox
                )
                machine.run(plan.instructions)
                done[number].update(machine.objectives)
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
    _complain(errors, mailbox)
    return done


def _complain(errors: dict[str, BaseException], mailbox: Mailbox) -> None:
    """Raise for what went wrong; that a program waits in vain only if no other fails."""
    for name in sorted(errors, key=lambda n: isinstance(errors[n], StoppedError)):
        raise AssertionError(f"the program of module '{name}' fails: {errors[name]}") from errors[name]
    left = [f"'{value}' to the program of '{home}'" for (value, home), q in mailbox.sent.items() if q]
    if left:
        raise AssertionError(f"the programs send {', '.join(left)}, which it never receives")
