"""SIGINT and SIGTERM finish the step, save and stop; a second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ECHO_S = 1.0
"""A scheduler such as SLURM sends its signal to every process of a job: to the launcher, which passes it on, and to its ranks.
To a launcher's rank the second within this time is the first one's echo."""


class StopRequest:
    """number: the signal that came, 0 while none has."""

    def __init__(self) -> None:
        self.number = 0
        self.came = 0.0

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Catch both signals within this block; outside the main thread they stay as they are."""

        def handle(number: int, frame: Any) -> None:
            if self.number:
                if "RANK" in os.environ and time.monotonic() - self.came < ECHO_S:
                    return
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.number, self.came = number, time.monotonic()
            say(f"{signal.Signals(number).name}: finishing this step and saving; send it again to stop at once")

        try:
            old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
