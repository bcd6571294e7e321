"""Where metrics go: metrics.jsonl always, wandb or tensorboard when asked. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
from pathlib import Path
from typing import Any, Protocol

from posttrain.disk import write_text
from posttrain.errors import ConfigError

Metrics = dict[str, Any]


class Sink(Protocol):
    """Takes every log line."""

    def log(self, step: int, split: str, metrics: Metrics, time_s: float) -> None: ...

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Texts to look at: a row each, all with the same columns."""

    def flush(self) -> None:
        """Called before a checkpoint is saved: a run that goes on from it logs nothing of what lies before it."""

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl, a line a log; on resuming, lines after the checkpoint's step are cut."""

    def __init__(self, path: Path, resumed_at: int | None) -> None:
        kept = _lines_until(path, resumed_at) if resumed_at is not None and path.exists() else []
        write_text(path, "".join(kept))
        self.file = path.open("ab", buffering=0)  # unbuffered: what the disk refuses is known at its own line

    def log(self, step: int, split: str, metrics: Metrics, time_s: float) -> None:
        line = {
            "step": step,
            "split": split,
            "time_s": round(time_s, 3),
            "metrics": {k: plain(v) for k, v in metrics.items()},
        }
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """samples.jsonl has them."""

    def flush(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it."""
        size = os.fstat(self.file.fileno()).st_size
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError:
            self.file.truncate(size)
            raise


class Wandb:
    """One wandb run; offline works without an account."""

    def __init__(self, options: Any, directory: Path, config: dict[str, Any], resumed: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("log=wandb needs the package wandb; pip install 'posttrain[wandb]'") from error
        saved = directory / "wandb_id.txt"
        if not (resumed and saved.is_file()):
            write_text(saved, secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=options.project,
                entity=options.entity,
                mode=options.mode,
                name=directory.name,
                dir=str(directory),
                id=saved.read_text(encoding="utf-8").strip(),
                resume="allow" if resumed and options.mode == "online" else None,
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"log=wandb: {told}; log.mode=offline needs neither account nor network") from error
        self.run.define_metric("*", step_metric="step")
        # its diary: on a full disk each line of it would print a traceback
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: None  # type: ignore[method-assign]

    def log(self, step: int, split: str, metrics: Metrics, time_s: float) -> None:
        self.run.log({"step": step, **{f"{split}/{k}": v for k, v in flatten(metrics).items()}})

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        import wandb

        if rows:
            data = [list(row.values()) for row in rows]
            self.run.log({"step": step, name: wandb.Table(columns=list(rows[0]), data=data)})

    def flush(self) -> None:
        """Each line is handed to wandb's own process at once, which outlives this one."""

    def close(self) -> None:
        self.run.finish()


class Tensorboard:
    """Event files under tensorboard/."""

    def __init__(self, directory: Path, config: dict[str, Any], resumed_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log=tensorboard needs the package tensorboard; pip install 'posttrain[tensorboard]'"
            ) from error
        _leave_to_the_next_line()
        purge = 0 if resumed_at is None else resumed_at + 1  # hides what a killed process logged past its checkpoint
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, step: int, split: str, metrics: Metrics, time_s: float) -> None:
        for name, value in flatten(metrics).items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def table(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        facts = [{k: v for k, v in row.items() if k not in ("prompt", "answer")} for row in rows]
        texts = [
            "  \n".join(f"{k} {v}" for k, v in fact.items())
            + f"\n\n{_quoted(row['prompt'])}\n\n---\n\n{_quoted(row['answer'])}"
            for fact, row in zip(facts, rows, strict=True)
        ]
        if texts:
            self.writer.add_text(name, "\n\n".join(texts), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _quoted(text: str) -> str:
    """As Markdown's code, which shows every character as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _leave_to_the_next_line() -> None:
    """TensorBoard writes in a thread; what the disk refuses there is raised at the next line or flush, and told once."""
    others = threading.excepthook

    def hook(found: Any) -> None:
        if not (isinstance(found.exc_value, OSError) and type(found.thread).__module__.startswith("tensorboard.")):
            others(found)

    threading.excepthook = hook


def open_sinks(options: Any, directory: Path, config: dict[str, Any], resumed_at: int | None) -> list[Sink]:
    """metrics.jsonl and the tracker that `log` names."""
    sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", resumed_at)]
    if options.name == "wandb":
        sinks.append(Wandb(options, directory, config, resumed_at is not None))
    elif options.name == "tensorboard":
        sinks.append(Tensorboard(directory, config, resumed_at))
    return sinks


def plain(value: Any) -> Any:
    """A number, or {"value", "low", "high", ...}; what is not finite becomes null."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(metrics: Metrics) -> dict[str, float]:
    """name → number, with name_low and name_high beside it, so that charts can show bands; null is left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        found = plain(value)
        parts = (
            {"": found}
            if not isinstance(found, dict)
            else {"": found["value"], "_low": found["low"], "_high": found["high"]}
        )
        flat |= {f"{name}{suffix}": float(number) for suffix, number in parts.items() if number is not None}
    return flat


def read_metrics(path: Path, split: str, step: int | None = None) -> tuple[int, Metrics] | None:
    """(step, metrics) of the last line of this split at this step, or of the split's first line; None if there is none."""
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line["metrics"]) for line in lines if line["split"] == split]
    return found[0] if found and step is None else next((f for f in reversed(found) if f[0] == step), None)


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines up to this step; a line that a kill cut in half is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    return kept
