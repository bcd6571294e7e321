"""From the arguments of a sweep to its jobs, each with a config that holds and a directory of its own."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain.config import RunConfig, resolve, resolve_section
from posttrain.config.grid import Point, expand
from posttrain.errors import ConfigError, UserError
from posttrain.rundir import RECORD as RUN
from posttrain.rundir import check_continues, default_name
from posttrain.sweep.record import RECORD, Job, Sweep, recorded

OWN = ("run.dir", "run.name", "run.root")
"""Keys that say where the sweep is; each job gets a directory in there."""

VALUE_CHARS, NAME_CHARS = 40, 120
SHOWN = 5


def plan(arguments: list[str]) -> Sweep:
    """Judge everything that can be judged before the first job starts. UserError with all jobs that cannot be."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(
            f"--multirun starts a launch of its own for each job, and this is one of a launcher's {world} processes; "
            f"leave the launcher out: posttrain --multirun run.processes={world} ..."
        )
    points = expand(arguments)
    for override in points[0].overrides:
        if _key(override) in OWN or _key(override).startswith("sweep."):
            raise ConfigError(f"{_key(override)} is of the whole sweep; give it one value")
    run = resolve_section(points[0].arguments, "run")
    sweep = Sweep(_directory(run), bool(run.dir or run.name), resolve_section(points[0].arguments, "sweep"), arguments)
    before = recorded(sweep.path) if sweep.named else {}
    if sweep.named:
        _check_ours(sweep.path)
    _add_jobs(sweep, points, before)
    return sweep


def move(sweep: Sweep, path: Path) -> None:
    """To the directory that was free."""
    if path != sweep.path:
        jobs, sweep.path, sweep.jobs = sweep.jobs, path, []
        points = [Point(tuple(job.arguments), job.overrides) for job in jobs]
        _add_jobs(sweep, points, {})


def _directory(run: RunConfig) -> Path:
    """Of the sweep; run.name names it, run.dir is it."""
    if run.dir:
        return Path(run.dir).expanduser()
    return Path(run.root).expanduser() / "sweeps" / (run.name or default_name("sweep"))


def _check_ours(path: Path) -> None:
    if (path / RUN).is_file():
        raise ConfigError(
            f"{path} holds a run, and a sweep needs a directory of its own; give another run.dir or run.name"
        )
    if path.is_dir() and not (path / RECORD).is_file() and any(entry.name[0] != "." for entry in path.iterdir()):
        raise ConfigError(f"{path} is not empty and holds no sweep of posttrain; give another run.dir or run.name")


def _add_jobs(sweep: Sweep, points: list[Point], before: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """Every job's config is judged, and what its directory already holds is compared with it."""
    wrong: list[tuple[Point, UserError]] = []
    for name, point in zip(_names(points, before), points, strict=True):
        try:
            sweep.jobs.append(_job(sweep.path / name, point, before.get(point.overrides, {})))
        except UserError as error:
            wrong.append((point, error))
    if wrong:
        lines = [f"  {' '.join(point.overrides)}: {error}" for point, error in wrong[:SHOWN]]
        lines += [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise ConfigError("\n".join([f"{len(wrong)} of {len(points)} jobs cannot be; none was started", *lines]))
    seen: dict[str, Job] = {}
    for job in sweep.jobs:
        same = seen.setdefault(repr({k: v for k, v in job.config.as_dict().items() if k != "run"}), job)
        if same is not job:
            raise ConfigError(f"{' '.join(same.overrides)} and {' '.join(job.overrides)} are the same run; keep one")


def _job(path: Path, point: Point, before: dict[str, Any]) -> Job:
    mine = [each for each in point.arguments if _key(each) not in OWN and not _key(each).startswith("sweep.")]
    arguments = [*mine, f"run.dir={path}"]
    config = resolve(arguments)
    check_continues(path, config.as_dict())
    return Job(path.name, path, point.overrides, arguments, config, slurm_job=before.get("slurm_job"))


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _names(points: list[Point], before: dict[tuple[str, ...], dict[str, Any]]) -> list[str]:
    """beta=0.05_lr=1e-5: the end of each key, as much as tells it from the others, and what is safe in a path of its value.
    Jobs that an earlier start named keep their names."""
    keys = [_key(override) for override in points[0].overrides]
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: leaf if leaves[leaf := key.rpartition(".")[2]] == 1 else key for key in keys}
    names: list[str] = []
    for point in points:
        known = before.get(point.overrides, {}).get("name")
        name = free = known or "_".join(_part(short, override) for override in point.overrides)[:NAME_CHARS]
        number = 1
        while free in names or (not known and any(free == each.get("name") for each in before.values())):
            number += 1
            free = f"{name}-{number}"
        names.append(free)
    return names


def _part(short: dict[str, str], override: str) -> str:
    """Of a path the end is kept, which says more."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", override.partition("=")[2])
    return f"{short[_key(override)]}={safe[-VALUE_CHARS:].strip('-') if len(safe) > VALUE_CHARS else safe}"
