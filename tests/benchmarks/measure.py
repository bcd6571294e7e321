"""What all measurements share: one process each, in a folder of its own, that prints a line of JSON.

Both sides train the same rows in the same order, bf16 autocast over fp32 weights, AdamW, constant rate. The first step warms
up and is not timed. trained tokens: targets; peak memory: the process's largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts import timing

LR = 2e-5
BATCH = 8
MAX_LENGTH = 512

Rows = list[dict[str, Any]]
Found = dict[str, Any]


def main(description: str | None, peers: dict[str, Callable[[Any, Rows], Found]]) -> None:
    """The command line of a measurement; `peers`: what each side does with the options and the rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=list(peers), required=True)
    parser.add_argument("--model", required=True, help="a transformers directory")
    parser.add_argument("--data", required=True, help="a JSON file of rows")
    parser.add_argument("--rows", type=int, default=200, help="how many of them training may use")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layout", choices=["padded", "packed"], default="padded")
    parser.add_argument("--adapter", choices=["none", "lora"], default="none")
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    rows = json.loads(Path(options.data).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = scratch
        with _silent():
            found = peers[options.peer](options, rows)
    found["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))


def posttrain_steps(options: Any, rows: Rows, overrides: list[str]) -> Found:
    """A run of ours: losses, trained tokens per second, and the share of each part of a step."""
    from posttrain import run

    Path("rows.json").write_text(json.dumps(rows[: options.rows]))
    common = [
        f"model.path={options.model}", "data.train=rows.json", "data.eval_fraction=0", "data.shuffle=false",
        f"data.max_length={MAX_LENGTH}", "data.max_lost_fraction=1", f"batch.size={BATCH}", f"batch.layout={options.layout}",
        f"adapter={options.adapter}", "precision=bf16", "schedule=constant", f"optim.lr={LR}", f"train.steps={options.steps}",
        f"train.save_every={options.steps}", "train.log_every=1", "eval.generate=0", "run.dir=r",
    ]  # fmt: skip
    with timing() as timers:
        run([*common, *overrides])
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    seconds = lines[-1]["time_s"] - lines[0]["time_s"]
    lines = [line["metrics"] for line in lines]
    return {
        "losses": [line["loss"] for line in lines],
        "trained_tokens_per_second": (lines[-1]["trained_tokens"] - lines[0]["trained_tokens"]) / seconds,
        "profile": timers.shares(),
    }


def posttrain_tokenisation(options: Any, rows: Rows) -> Found:
    """Rows per second of what comes before training: read, render, tokenise, mask, write."""
    from posttrain.config import resolve
    from posttrain.data.pipeline import prepare
    from posttrain.models.load import load_tokenizer

    Path("all.json").write_text(json.dumps(rows))
    cfg = resolve([
        f"model.path={options.model}", "data.train=all.json", "data.eval_fraction=0", f"data.max_length={MAX_LENGTH}",
        "data.max_lost_fraction=1",
    ])  # fmt: skip
    tokenizer = load_tokenizer(cfg.model)
    began = time.perf_counter()
    prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed)
    return {"rows_per_second": len(rows) / (time.perf_counter() - began)}


def trl_arguments(options: Any) -> Found:
    """What our overrides say, in TRL's words."""
    return {
        "output_dir": "trl", "per_device_train_batch_size": BATCH, "learning_rate": LR, "max_steps": options.steps,
        "lr_scheduler_type": "constant", "logging_steps": 1, "max_length": MAX_LENGTH, "bf16": True,
        "gradient_checkpointing": False, "report_to": "none", "use_cpu": True, "save_strategy": "no", "max_grad_norm": 1.0,
        "weight_decay": 0.0, "disable_tqdm": True,
    }  # fmt: skip


def trl_steps(trainer: Any, trained: list[int]) -> Found:
    """Losses and trained tokens per second of a TRL trainer; trained: target tokens of each example, in order."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.monotonic())

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trained_tokens_per_second": sum(trained[BATCH:]) / (clock.times[-1] - clock.times[0]),
    }


@contextmanager
def _silent() -> Iterator[None]:
    """Standard output is for the line of JSON alone."""
    said = sys.stdout
    with open(os.devnull, "w") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout = said
