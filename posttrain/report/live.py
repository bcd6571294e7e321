"""report.html while a run goes on: written after evaluations, for a small share of the run's time, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from posttrain.rundir import RunDir

SHARE = 0.02
"""Of the time since a page was begun: at most so much goes into writing pages."""
SOON = 30.0
"""Seconds before the first one while training; shorter runs have it at their end."""


class LivePage:
    """The run's page. tell: says once what keeps it from being written; training goes on without it."""

    def __init__(self, run: RunDir, wanted: bool, tell: Callable[[str], None]) -> None:
        self.run, self.wanted, self.tell = run, wanted, tell
        self.next = time.monotonic() + SOON

    def write(self, at_end: bool = False) -> None:
        """Write it, unless while training the last one was too short a time ago."""
        began = time.monotonic()
        if not self.wanted or not (at_end or began >= self.next):
            return
        from posttrain.report.page import write_report

        try:
            write_report(self.run.path)
        except Exception as error:  # a page is for looking at: no reason to lose a run
            self.wanted = False
            self.tell(
                f"warning: report.html could not be written ({type(error).__name__}: {error}); posttrain report {self.run.path}"
            )
        taken = time.monotonic() - began
        self.next = time.monotonic() + taken / SHARE
