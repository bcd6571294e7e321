"""What a SLURM job of a sweep calls. It imports nothing heavy: the ranks do that."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError
from posttrain.launch import Launch, environments


class Training:
    """What a SLURM job calls: the ranks of one run; returns its exit status. `checkpoint` is submitit's way to ask, shortly
    before the time limit or at a preemption, what should be called when the job is queued again."""

    def __init__(self, arguments: Sequence[str], processes: int, program: Sequence[str]) -> None:
        self.arguments, self.processes, self.program = arguments, processes, program
        self.launch: Launch | None = None

    def __call__(self) -> int:
        self.launch = Launch([*self.program, *self.arguments], environments(self.processes, print))
        return self.launch.run()

    def checkpoint(self) -> Any:
        """The same command: it goes on from the checkpoint that the ranks save now."""
        if self.launch is not None:
            self.launch.stop(signal.SIGTERM)
        return submitit().helpers.DelayedSubmission(Training(self.arguments, self.processes, self.program))


def submitit() -> Any:
    """The package, an extra."""
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise ConfigError(
            "sweep.launcher=slurm needs submitit, which is not installed; pip install 'posttrain[slurm]'"
        ) from None
