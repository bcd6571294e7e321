"""Every exception this package raises on purpose.

A user's mistake is one of the `UserError`s: the command line prints it in a few lines without a traceback and exits
with 2. An invariant of ours that breaks is an AssertionError, and is a bug. Each message says what was given, what is
allowed and what to try.
"""

import os


class UserError(ValueError):
    """Something the user gave cannot be used; exit status 2."""


class ConfigError(UserError):
    """A key, a value or a combination of values in the configuration."""


class DataError(UserError):
    """A data file, a row or a column."""


class ModelError(UserError):
    """A model, tokenizer, adapter or chat template."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be continued."""


class OutputError(UserError):
    """A place that cannot be written: no permission, no room."""


class TrainingError(RuntimeError):
    """Training cannot go on (a non-finite loss or gradient); exit status 1."""


class Stopped(Exception):
    """A signal asked the run to end; its checkpoint is saved. Exit status 128 + signal."""

    def __init__(self, signal_number: int, run_dir: str) -> None:
        super().__init__(
            f"stopped by signal {signal_number}; the same command with run.dir={run_dir} continues the run"
        )
        self.signal_number = signal_number


def tell_here(error: Exception, here: bool) -> None:
    """Of several ranks that fail, one tells: whether it is this one."""
    error.told_here = here  # type: ignore[attr-defined]


def is_told_here(error: Exception) -> bool:
    """Before the ranks know of each other each meets the same mistake, and the first tells it."""
    return bool(getattr(error, "told_here", os.environ.get("RANK", "0") == "0"))
