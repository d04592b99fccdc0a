"""Runs the module programs of a program side by side, in threads of this process."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

from torch import Tensor

from locc.lower import Receive, Send
from locc.program import Program
from locc.runtime.backends import BACKENDS
from locc.runtime.streams import preserved_rng

from .trial import twin

PATIENCE = 60.0
"""Seconds after which a program that waits for a value gives up."""


class StoppedError(Exception):
    """Another program has failed, or what it should have sent never came."""


class Mailbox:
    """One queue for each value and each program that receives it."""

    def __init__(self, homes: dict[str, str]) -> None:
        self.homes = homes
        self.failed = threading.Event()
        self.queues: dict[tuple[str, str], queue.Queue[Any]] = {}
        self.lock = threading.Lock()

    def _queue(self, value: str, home: str) -> queue.Queue[Any]:
        with self.lock:
            return self.queues.setdefault((value, home), queue.Queue())

    def send(self, instruction: Send, value: Any) -> None:
        """Put a value into the queue of each program that reads it."""
        for home in dict.fromkeys(self.homes[owner] for owner in instruction.to):
            self._queue(instruction.value, home).put(value)

    def receive(self, instruction: Receive) -> Any:
        """Take the next value; give up when another program fails."""
        waiting = self._queue(instruction.value, self.homes[instruction.owner])
        for _ in range(int(PATIENCE / 0.05)):
            try:
                return waiting.get(timeout=0.05)
            except queue.Empty:
                if self.failed.is_set():
                    break
        raise StoppedError(f"'{instruction.value}' of '{instruction.source}' never came")


def run_beside(program: Program, batches: list[list[Any]]) -> list[dict[str, Tensor]]:
    """Train on batches with one thread for each module's program; returns the objectives of each step.

    Raises:
        AssertionError: a program fails; names it.
    """
    programs = program.module_programs
    mailbox = Mailbox({owner: p.name for p in programs.values() for owner in p.owners})
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
            mailbox.failed.set()

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in programs]
    with preserved_rng(program.device):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first = next((n for n, e in errors.items() if not isinstance(e, StoppedError)), next(iter(errors), None))
    if first is not None:
        raise AssertionError(f"the program of module '{first}' fails: {errors[first]}") from errors[first]
    return done
