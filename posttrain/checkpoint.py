"""Checkpoints: complete or absent, never half. A directory is written under another name, flushed, and renamed.

`checkpoints/step-000100/` holds model/ (weights or adapter as transformers or peft load them), optimizer.pt, rng.pt (one state a
rank) and state.json (step, counters, best so far, what the log has pooled).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError

NAME = re.compile(r"step-(\d{6,})")


@dataclass
class TrainState:
    """Everything the loop knows besides weights, optimizer and random states; it goes into state.json."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    pooled: dict[str, list[float]] = field(default_factory=dict)


def name_of(step: int) -> str:
    """step-000100"""
    return f"step-{step:06d}"


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save(
    root: Path,
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    rng: list[dict[str, Any]],
    save_model: Callable[[Path], None],
) -> Path:
    """Write one checkpoint (rank 0 only); rng: every rank's random state."""
    root.mkdir(parents=True, exist_ok=True)
    final, scratch = root / name_of(state.step), root / f".{name_of(state.step)}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        save_model(scratch / "model")
        torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
        torch.save(rng, scratch / "rng.pt")
        (scratch / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        flush(scratch)
        remove(final)
        scratch.rename(final)
        _flush_directory(root)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return final


def load_state(checkpoint: Path) -> TrainState:
    """state.json of a complete checkpoint."""
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {error}") from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Moments and steps back into the optimizer; CheckpointError if they belong to another model."""
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    shapes = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if shapes != here:
        raise CheckpointError(f"{checkpoint} was saved from another model: {shapes} trained tensors there, {here} here")
    optimizer.load_state_dict(saved)


def load_rng(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """This rank's random state; None where the checkpoint was made by fewer ranks."""
    states = torch.load(checkpoint / "rng.pt", map_location="cpu", weights_only=False)
    return states[rank] if rank < len(states) else None


def rotate(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` and the best."""
    for path in complete(root)[:-keep]:
        if best_step is None or path.name != name_of(best_step):
            remove(path)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a directory so that at no moment half of it bears its name."""
    if path.exists():
        trash = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash)


def flush(directory: Path) -> None:
    """Push every file below to the disk before the rename makes them count."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
