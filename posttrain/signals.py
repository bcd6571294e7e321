"""SIGINT and SIGTERM finish the step, save and stop; a second one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """number: the signal that came, 0 while none has."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Catch both signals within this block; outside the main thread they stay as they are."""

        def handle(number: int, frame: Any) -> None:
            if self.number:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.number = number
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
