"""The jobs of a sweep one after another on this machine, each a launch of its own."""

from __future__ import annotations

import time

from posttrain.launch import PROGRAM, Launch, environments
from posttrain.report.console import Console
from posttrain.sweep.record import Sweep


def run_here(sweep: Sweep, console: Console) -> int:
    """Returns the signal that stopped it, 0 if none did. A job that fails does not keep the others from running."""
    for number, job in enumerate(sweep.jobs, 1):
        console.title(f"job {number} of {len(sweep.jobs)}: {' '.join(job.overrides)}")
        if job.is_finished:
            console.line(f"{job.path} is already finished")
            job.ended(0)
            continue
        launch = Launch([*PROGRAM, *job.arguments], environments(job.processes, console.line))
        with sweep.running(job):
            began = time.monotonic()
            job.ended(launch.run(), time.monotonic() - began)
        if launch.signals:
            return launch.signals[0]
        if job.status != "done":
            console.line(f"job {number} of {len(sweep.jobs)} {job.status} (exit status {job.exit_status})")
    return 0
