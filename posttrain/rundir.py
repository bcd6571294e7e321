"""A run's directory: where it is, whether it may be written, what of it continues, and what it was run with."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.checkpoint import complete, is_complete, step_of
from posttrain.claim import LOCK, Claim
from posttrain.disk import check_writable, write_json, write_text, writing
from posttrain.environment import environment
from posttrain.errors import CheckpointError, ConfigError

RECORD = "config.json"
"""The whole config as plain values, and the verb: what a continuation is compared with."""

LEFTOVERS = (
    "metrics.jsonl", "samples.jsonl", "data.json", "wandb_id.txt", "report.html", "eval/examples.parquet",
    "eval/step-*.parquet", "eval/step-*.tmp", "eval/harness-*", "eval/temperature.json",
)  # fmt: skip
LEFTOVER_FOLDERS = ("checkpoints/.step-*", "tensorboard", "wandb/*run-*")
RECORDED = {
    "stage",
    "model",
    "adapter",
    "data",
    "batch",
    "optim",
    "schedule",
    "precision",
    "train",
    "eval",
    "run",
    "log",
}
"""Sections by which a record is known as ours."""

FREE_KEYS = (
    "run", "log", "distribution", "data.cache", "data.on_bad_row", "data.max_lost_fraction", "train.resume",
    "train.keep_checkpoints", "train.log_every",
)  # fmt: skip
"""Keys that may differ between a run and its continuation: they decide where and how things are written, how ranks share the
work, or whether a bad row ends the run, not what it trains on."""


@dataclass(frozen=True)
class RunDir:
    """path: the directory. checkpoint: where to continue from, or None. finished: the run is already done.

    failed_start: what it holds of an earlier start that came to nothing, and is removed when this one begins.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    failed_start: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def records(self, step: int) -> Path:
        """Per-example records of the evaluation at this step."""
        return self.path / "eval" / f"step-{step:06d}.parquet"


def default_name(stage: str) -> str:
    """sft-20261121-101500; of two runs in the same second the later one gets -2."""
    return f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_data(run: RunDir, fingerprint: str) -> None:
    """A run goes on with the data it began with: other rows would be other steps, and scores that cannot be compared."""
    record = run.path / "environment.json"
    if run.checkpoint is None or run.path.resolve() not in run.checkpoint.resolve().parents or not record.is_file():
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8")).get("data_fingerprint")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{record} cannot be read: {error}; it says which data the run began with: if that is the data given now, delete it"
        ) from error
    if before not in (None, fingerprint):
        raise CheckpointError(
            f"{run.path} was begun with other data: the files of data.train or data.eval have changed since. Restore them, "
            "or start a new run (run.dir), from the checkpoint's model if you like (model.path)"
        )


def open_run(config: dict[str, Any], stage: str, claim: Claim, verb: str = "train") -> RunDir:
    """Decide where the run goes and whether it continues; on rank 0 only, the others are told. `claim` then holds it.

    train.resume=auto: the same config continues its newest complete checkpoint, another config is refused, no checkpoint
    starts over, a finished run is said to be finished. never: the directory must hold no run. PATH: that checkpoint.
    A start that failed before it had logged or saved a step is no run: any config may take its place.
    """
    run, resume = config["run"], str(config["train"]["resume"])
    root = Path(run["root"]).expanduser()
    path = Path(run["dir"]).expanduser() if run["dir"] else root / (run["name"] or default_name(stage))
    check_writable(path)
    if run["dir"] or run["name"]:
        _check_ours(path)  # before anything is put there
    else:
        path = claim.make(path)
    claim.take(path)
    failed_start = False
    if (path / RECORD).is_file():
        then = _recorded(path / RECORD)
        failed_start = not _began(path)
        if resume == "never" and not failed_start:
            raise CheckpointError(
                f"run.dir={path} already holds a run and train.resume=never; give another run.dir or delete it"
            )
        if not failed_start:
            _check_same(path, then, {**config, "verb": verb})
    found = complete(path / "checkpoints")
    if resume not in ("auto", "never"):
        chosen = _chosen_checkpoint(Path(resume).expanduser())
        inside = path.resolve() in chosen.resolve().parents
        if inside or not found or step_of(found[-1]) <= step_of(chosen):
            return RunDir(path, chosen, failed_start=failed_start)
        # the run that began from that checkpoint has come further: the same command goes on, as it would without it
    return RunDir(
        path, found[-1] if found else None, finished=(path / "summary.json").is_file(), failed_start=failed_start
    )


def check_continues(path: Path, config: dict[str, Any], verb: str = "train") -> None:
    """Refuse, before anything is started, what `open_run` would refuse: a directory of another's, a run of another config."""
    _check_ours(path)
    if (path / RECORD).is_file() and _began(path):
        _check_same(path, _recorded(path / RECORD), {**config, "verb": verb})


def create(
    run: RunDir, config: dict[str, Any], yaml: str, overrides: list[str], facts: dict[str, Any], verb: str = "train"
) -> None:
    """Write config.yaml, overrides.txt and environment.json; says plainly when the place cannot be written.

    The record that makes the directory a run comes first, so that a run killed right here can still be started again.
    """
    with writing(run.path, "set run.dir or run.root"):
        run.path.mkdir(parents=True, exist_ok=True)
        if run.failed_start:
            _clear(run.path)
        write_json(run.path / RECORD, {**config, "verb": verb})
        write_text(run.path / "config.yaml", yaml)
        write_text(run.path / "overrides.txt", "".join(f"{line}\n" for line in overrides))
        write_json(run.path / "environment.json", {**environment(), **facts})
        (run.path / "summary.json").unlink(missing_ok=True)  # train.resume=PATH takes a finished run up again


def _recorded(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; give another run.dir or delete {path.parent}"
        ) from error
    if not isinstance(recorded, dict) or not recorded.keys() >= RECORDED or "name" not in (recorded["stage"] or ()):
        raise ConfigError(f"run.dir={path.parent} holds a {RECORD} that is no run's of posttrain; give another run.dir")
    return {"verb": "train", **recorded}


def _check_ours(path: Path) -> None:
    """A directory that is there must be empty, or a run's."""
    if (path / RECORD).is_file():
        _recorded(path / RECORD)
    elif path.is_dir() and any(entry.name not in (LOCK, f".{RECORD}.tmp") for entry in path.iterdir()):
        raise ConfigError(f"run.dir={path} is not empty and holds no run of posttrain; give another run.dir")


def _began(path: Path) -> bool:
    """Whether there is anything to lose: a checkpoint, a summary, or a logged training step."""
    if any((path / "checkpoints").glob("step-*")) or (path / "summary.json").is_file():
        return True
    log = path / "metrics.jsonl"
    return log.is_file() and '"split": "train"' in log.read_text(encoding="utf-8", errors="replace")


def _clear(path: Path) -> None:
    """Delete what an earlier start left that came to nothing: its scores before training, its trackers' files. What a user
    has put beside them stays."""
    for pattern in LEFTOVERS:
        for file in path.glob(pattern):
            file.unlink()
    for pattern in LEFTOVER_FOLDERS:
        for folder in path.glob(pattern):
            shutil.rmtree(folder)
    for name in ("eval", "checkpoints", "wandb"):
        with suppress(OSError):  # not empty, or not there
            (path / name).rmdir()


def _check_same(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = flat(then), flat(now)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not _is_free(k)]
    if keys:
        shown = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in keys[:4])
        raise CheckpointError(
            f"run.dir={path} holds a run with another config: {shown}{', ...' if len(keys) > 4 else ''}; "
            "give another run.dir, or the config it was started with (its config.yaml)"
        )


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return found


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _chosen_checkpoint(path: Path) -> Path:
    if is_complete(path):
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise CheckpointError(
            f"train.resume={path} holds no complete checkpoint; give a run or one of its checkpoints/step-…"
        )
    return found[-1]
