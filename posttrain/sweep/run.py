"""A sweep from its arguments to its table."""

from __future__ import annotations

from pathlib import Path

from posttrain.claim import Claim
from posttrain.disk import check_writable
from posttrain.report.console import Console
from posttrain.sweep.ending import tell
from posttrain.sweep.here import run_here
from posttrain.sweep.plan import move, plan
from posttrain.sweep.record import Sweep
from posttrain.sweep.slurm import check_cluster, run_on_slurm


def sweep(arguments: list[str]) -> int:
    """Returns the exit status: 0 where all jobs are done, 128 + signal where one stopped the sweep, 2 where every job ended
    with 2, else 1."""
    console, planned, claim = Console(), plan(arguments), Claim()
    if planned.options.launcher == "slurm":
        check_cluster()
    check_writable(planned.path)
    try:
        move(planned, planned.path if planned.named else claim.make(planned.path))
        claim.take(planned.path)
        return _run(planned, console)
    finally:
        claim.release()


def _run(sweep: Sweep, console: Console) -> int:
    sweep.write()
    waiting = [job for job in sweep.jobs if not job.is_finished]
    done = f", {len(sweep.jobs) - len(waiting)} of them already finished" if len(waiting) < len(sweep.jobs) else ""
    console.title(f"sweep of {len(sweep.jobs)} runs in {sweep.path}{done}")
    for job in sweep.jobs:
        console.line(f"  {' '.join(job.overrides)}")
    try:
        number = run_here(sweep, console) if sweep.options.launcher == "local" else run_on_slurm(sweep, console)
    except KeyboardInterrupt:
        number = 2
    sweep.write()
    if number:
        console.line(f"\nthe sweep was stopped; {_again(sweep.path)}")
        return 128 + number
    tell(sweep, console)
    statuses = {job.exit_status for job in sweep.jobs}
    if statuses == {0}:
        return 0
    console.line(f"\n{_again(sweep.path)}: finished runs are kept, the others are tried again")
    return 2 if statuses == {2} else 1


def _again(path: Path) -> str:
    return f"the same command with run.dir={path} goes on"
