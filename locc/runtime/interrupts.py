"""Ctrl-C that waits for what must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Lets the first Ctrl-C wait until a step is over; a second one interrupts at once.

    With `held` the first one is only noted, for whoever looks at `noted` where it may be heeded; `cut` says
    that one has interrupted.
    Only in the main thread, and only where Ctrl-C would raise KeyboardInterrupt: a handler that somebody
    else has set stays in charge.
    """

    def __init__(self, held: bool = False) -> None:
        self.noted = self.cut = False
        self.held = held
        self._busy = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take care of Ctrl-C inside; the handler of before comes back."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.noted or not (self._busy or self.held):
            self.cut = True
            raise KeyboardInterrupt
        self.noted = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let what is inside come to its end before a first Ctrl-C raises KeyboardInterrupt."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self.noted and not self.held:
            raise KeyboardInterrupt
