"""The jobs of a sweep as SLURM jobs, through submitit: each starts its own ranks on its node, run.processes of them.

This process waits for them. Where it is interrupted they go on, and the same command finds them again by the ids in sweep.json.
A job that reaches its time limit saves a checkpoint and is queued again.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.launch import PROGRAM
from posttrain.report.console import Console
from posttrain.sweep.record import Job, Sweep
from posttrain.sweep.training import Training, submitit

LOGS = "slurm"
POLL_S = 5.0
ASK_S = 60.0
"""How often the queue is asked about jobs that have left no result: those that were cancelled, or whose node failed."""

WARNING_S = 120
"""Between submitit's signal and the time limit: for a step and a checkpoint."""

GONE = ("UNKNOWN", "NODE_FAIL", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def check_cluster() -> None:
    """ConfigError where nothing can be submitted."""
    submitit()
    missing = [name for name in ("sbatch", "srun", "sacct") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"sweep.launcher=slurm, but there is no {', '.join(missing)} here; start it where SLURM's commands are, or leave "
            "sweep.launcher=local"
        )


def run_on_slurm(sweep: Sweep, console: Console) -> int:
    """Submit what is not finished and not on its way, wait, and tell how each ended."""
    folder = (sweep.path / LOGS).absolute()
    waiting = [job for job in sweep.jobs if not _already(job)]
    found = {job.name: (job, known) for job in waiting if (known := _on_its_way(job, folder)) is not None}
    fresh = [job for job in waiting if job.name not in found]
    if found:
        console.line(
            f"{len(found)} are on their way already: {', '.join(str(job.slurm_job) for job, _ in found.values())}"
        )
    if fresh:
        executor = _executor(sweep, folder, max(job.processes for job in fresh))
        found |= submit(sweep, fresh, executor)
        console.line(f"{len(fresh)} submitted: {', '.join(str(job.slurm_job) for job in fresh)}; logs in {folder}")
    try:
        wait(sweep, list(found.values()), console)
    except KeyboardInterrupt:
        console.line(
            f"\nthe jobs go on; scancel {' '.join(str(job.slurm_job) for job, _ in found.values())} stops them"
        )
        raise
    return 0


def submit(sweep: Sweep, jobs: list[Job], executor: Any) -> dict[str, tuple[Job, Any]]:
    """One array of them all. Name → the job and submitit's."""
    given = executor.submit_array([Training(job.arguments, job.processes, PROGRAM) for job in jobs])
    for job, known in zip(jobs, given, strict=True):
        job.slurm_job, job.status = known.job_id, "running"
    sweep.write()
    return {job.name: (job, known) for job, known in zip(jobs, given, strict=True)}


def wait(sweep: Sweep, jobs: list[tuple[Job, Any]], console: Console) -> None:
    """Until all have ended."""
    asked, began = time.monotonic(), time.monotonic()
    while jobs:
        ask = time.monotonic() - asked > ASK_S
        asked = time.monotonic() if ask else asked
        for job, known in list(jobs):
            if not known.done(force_check=ask):
                continue
            jobs.remove((job, known))
            job.ended(_status(known), time.monotonic() - began)
            sweep.write()
            how = job.status if job.status == "done" else f"{job.status}, see {known.paths.stderr}"
            console.line(f"{job.name}: {how} ({len(jobs)} to go)")
        if jobs:
            time.sleep(POLL_S)


def _already(job: Job) -> bool:
    if job.is_finished:
        job.ended(0)
    return job.is_finished


def _status(known: Any) -> int | None:
    """The exit status of its run; None where it left none."""
    try:
        status: int = known.result()
        return status
    except submitit().core.utils.UncompletedJobError:  # of which a failed job's is one
        return None


def _on_its_way(job: Job, folder: Path) -> Any:
    """submitit's view of the SLURM job that trains it now, by an earlier start of this sweep."""
    if job.slurm_job is None:
        return None
    known = submitit().SlurmJob(folder=folder, job_id=job.slurm_job)
    state = known.watcher.get_state(known.job_id, mode="force").split()[0].upper()
    return None if state in GONE or known.done() else known


def _executor(sweep: Sweep, folder: Path, processes: int) -> Any:
    options = sweep.options
    executor = submitit().SlurmExecutor(folder=folder, max_num_timeout=options.requeues)
    gpus = processes if options.gpus is None else options.gpus
    executor.update_parameters(
        job_name=f"posttrain-{sweep.path.name}",
        time=options.timeout_minutes,
        nodes=1,
        ntasks_per_node=1,
        partition=options.partition,
        account=options.account,
        gpus_per_node=gpus or None,
        cpus_per_task=options.cpus,
        mem=None if options.memory_gb is None else f"{int(options.memory_gb * 1024)}MB",
        signal_delay_s=WARNING_S,
        array_parallelism=options.max_parallel or len(sweep.jobs),
        setup=list(options.setup) or None,
    )
    return executor
