"""Checkpoints: complete or absent, never half. A directory is written under another name, flushed, and renamed.

`checkpoints/step-000100/` holds model/ (weights or adapter as transformers or peft load them), optimizer.pt, rng.pt (one state a
rank) and state.json (step, counters, best so far, what each rank has pooled for the log, where a stream of data is). Of weights
that lie in parts on the ranks, shards/ (shards.py) holds both these and the optimizer, and model/ config and tokenizer alone.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.disk import remove, whole_directory, writing
from posttrain.errors import CheckpointError, UserError
from posttrain.models.lineage import SHARDS
from posttrain.models.sharding import like

NAME = re.compile(r"step-(\d{6,})")
WHOLE, IN_PARTS = ("model", "optimizer.pt", "rng.pt", "state.json"), ("model", SHARDS, "rng.pt", "state.json")
UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip
"""What loading a damaged file, or one that holds something else, may raise."""


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
    pooled: list[dict[str, list[float]]] = field(default_factory=list)
    reference: dict[str, str] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    loss_scaler: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0


def name_of(step: int) -> str:
    """step-000100"""
    return f"step-{step:06d}"


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def is_complete(path: Path) -> bool:
    """Whether this is a checkpoint with all its parts."""
    return any(all((path / part).exists() for part in parts) for parts in (WHOLE, IN_PARTS))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[5:])


def save(
    root: Path,
    state: TrainState,
    moments: dict[str, Any],
    rng: list[dict[str, Any]],
    save_model: Callable[[Path], None],
) -> Path:
    """Write one checkpoint (rank 0 only). moments: the optimizer's state. rng: every rank's random state."""
    final = root / name_of(state.step)
    with writing(final), whole_directory(final, scratch_of(root, state.step)) as scratch:
        save_model(scratch / "model")
        torch.save(moments, scratch / "optimizer.pt")
        _save_rest(scratch, state, rng)
    return final


@contextmanager
def in_parts(
    root: Path, state: TrainState, rng: list[dict[str, Any]], save_config: Callable[[Path], None]
) -> Iterator[None]:
    """Rank 0's side of a checkpoint that every rank puts its part into, within this block, which ends when all have."""
    final = root / name_of(state.step)
    with writing(final), whole_directory(final, scratch_of(root, state.step)) as scratch:
        (scratch / SHARDS).mkdir()
        save_config(scratch / "model")
        yield
        _save_rest(scratch, state, rng)


def scratch_of(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is one."""
    return root / f".{name_of(step)}.tmp"


def _save_rest(scratch: Path, state: TrainState, rng: list[dict[str, Any]]) -> None:
    torch.save(rng, scratch / "rng.pt")
    (scratch / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")


@contextmanager
def reading(checkpoint: Path, part: str) -> Iterator[None]:
    """Whatever is wrong with a file of a checkpoint becomes a CheckpointError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or ["it is cut short"])[0]
        if isinstance(
            error, pickle.UnpicklingError
        ):  # torch says how to load it all the same, which would run its code
            reason = "it is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"{checkpoint / part} cannot be read: {reason}; {way_out(checkpoint)}") from error


def way_out(checkpoint: Path) -> str:
    """What to do where a checkpoint is damaged."""
    others = [path.name for path in complete(checkpoint.parent) if path != checkpoint]
    if not others:
        return f"delete {checkpoint}: it is the only checkpoint there, so the run then starts over"
    listed = f"{', '.join(others[-5:])}{'' if len(others) <= 5 else f' and {len(others) - 5:,} older ones'}"
    return f"delete {checkpoint}, and the same command goes on from {others[-1]} (there are {listed})"


def load_state(checkpoint: Path) -> TrainState:
    """state.json of a complete checkpoint."""
    with reading(checkpoint, "state.json"):
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def _load(checkpoint: Path, part: str) -> Any:
    """Tensors and plain values; a file that would run code as it is read is refused."""
    return torch.load(checkpoint / part, map_location="cpu", weights_only=True)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, as_read: bool = False) -> None:
    """Moments and steps back into the optimizer; CheckpointError if they belong to another model. as_read: whole, in host
    memory, from where DeepSpeed's parts are filled (zero.py)."""
    with reading(checkpoint, "optimizer.pt"):
        saved = _load(checkpoint, "optimizer.pt")
        shapes = [len(group["params"]) for group in saved["param_groups"]]
        moments_of = dict(saved["state"])
    here = [len(group["params"]) for group in optimizer.param_groups]
    if shapes != here:
        raise CheckpointError(f"{checkpoint} was saved from another model: {shapes} trained tensors there, {here} here")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in moments_of.items():
        shape, there = tuple(parameters[index].shape), moments.get("exp_avg")
        if there is not None and tuple(there.shape) != shape:
            raise CheckpointError(
                f"{checkpoint} was saved from another model: a trained tensor is {tuple(there.shape)} there, {shape} here"
            )
    if as_read:
        optimizer.state.update({parameters[index]: moments for index, moments in moments_of.items()})
        return
    for index, moments in moments_of.items():
        moments |= {
            key: like(value, parameters[index]) for key, value in moments.items() if isinstance(value, torch.Tensor)
        }
    optimizer.load_state_dict(saved)


def load_rng(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """This rank's random state; None where the checkpoint was made by fewer ranks."""
    with reading(checkpoint, "rng.pt"):
        states: list[dict[str, Any]] = list(_load(checkpoint, "rng.pt"))
        return states[rank] if rank < len(states) else None


def rotate(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` and the best, and what a killed process left half done."""
    with writing(root):
        for path in complete(root)[:-keep]:
            if best_step is None or path.name != name_of(best_step):
                remove(path)
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def drop_newer(root: Path, step: int) -> list[str]:
    """Delete checkpoints of later steps, which a run that goes back to this one leaves behind; returns their names."""
    newer = [path for path in complete(root) if step_of(path) > step]
    for path in newer:
        remove(path)
    return [path.name for path in newer]
