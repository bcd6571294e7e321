"""The jobs of a sweep, and sweep.json, which has them all: what each is, where it is, how it ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.disk import write_json, writing
from posttrain.errors import CheckpointError

if TYPE_CHECKING:
    from posttrain.config import Config, SweepConfig

RECORD = "sweep.json"
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM)}


@dataclass
class Job:
    """One run of a sweep. overrides: what sets it apart. arguments: of the posttrain that trains it.

    status: waiting, running, done, stopped (a checkpoint is there) or failed. slurm_job: the id of the job that trains it.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]
    arguments: list[str]
    config: Config
    status: str = "waiting"
    exit_status: int | None = None
    seconds: float | None = None
    slurm_job: str | None = None

    @property
    def processes(self) -> int:
        return self.config.run.processes or 1

    @property
    def is_finished(self) -> bool:
        """Whether its run is: nothing is left to be done."""
        return (self.path / "summary.json").is_file()

    def ended(self, exit_status: int | None, seconds: float | None = None) -> None:
        """None: it ended in a way that left no status, such as a node that failed."""
        self.exit_status, self.seconds = exit_status, seconds
        self.status = "done" if exit_status == 0 else "stopped" if exit_status in STOPPED else "failed"

    def told(self) -> dict[str, Any]:
        """For sweep.json."""
        names = ("name", "overrides", "status", "exit_status", "seconds", "slurm_job")
        return {"directory": str(self.path), **{name: getattr(self, name) for name in names}}


@dataclass
class Sweep:
    """path: its directory, or where it would like it to be. named: whether the user gave it, so that it is the same again."""

    path: Path
    named: bool
    options: SweepConfig
    arguments: list[str]
    jobs: list[Job] = field(default_factory=list)

    def write(self) -> None:
        """Make sweep.json say how things stand."""
        content = {"arguments": self.arguments, "launcher": self.options.launcher}
        with writing(self.path):
            write_json(self.path / RECORD, {**content, "jobs": [job.told() for job in self.jobs]})

    @contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Say that it runs, then how it ended."""
        job.status = "running"
        self.write()
        try:
            yield
        finally:
            self.write()


def recorded(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Overrides → what an earlier start of the sweep in this directory says of that job; {} where there was none."""
    if not (path / RECORD).is_file():
        return {}
    try:
        content = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return {tuple(job["overrides"]): dict(job) for job in content["jobs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / RECORD} cannot be read ({type(error).__name__}: {error}); it is damaged: delete it, and the runs beside "
            "it still go on"
        ) from error
