"""One training step's speed and memory on two ranks: ddp, fsdp and, where it is installed, deepspeed, by turns.

python tests/benchmarks/distribution.py --model DIR --data FILE [--rounds 3] [--layers 8] [--length 256] [--write]

The model has random weights (SmolLM2's shape, other sizes by --layers), so nothing is downloaded; memory is rank 0's largest
resident set (on a GPU what was allocated there), which has read the whole weights before it kept its part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
MARK = "<!-- distribution -->"


def measured(how: str, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """summary.json of a short run."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "model.path": options.model, "model.init": "config", "model.config.num_hidden_layers": options.layers,
            "data.train": options.data, "data.eval_fraction": 0, "train.steps": 5, "train.log_every": 1, "eval.generate": 0,
            "batch.size": 8, "data.max_length": options.length, "data.max_lost_fraction": 1, "precision": precision,
            "distribution": how, "run.dir": f"{scratch}/run", "train.save_every": 1000, "log.report": "false",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "posttrain",
        ]
        command += [f"{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[:2000])
        found: dict[str, Any] = json.loads(Path(scratch, "run", "summary.json").read_text(encoding="utf-8"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers directory, whose shape and tokenizer are used")
    parser.add_argument("--data", required=True, help="rows to train on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of an example at most")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="bf16 is slow on a CPU without AMX")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    options = parser.parse_args()
    kinds = ["ddp", "fsdp"] + (["deepspeed"] if importlib.util.find_spec("deepspeed") else [])
    lines = [f"| case | {' | '.join(f'{kind}: tokens/s, GiB' for kind in kinds)} | fsdp/ddp: speed, memory |"]
    lines.append("|" + "---|" * (len(kinds) + 2))
    for precision in options.precisions:
        rounds = [{kind: measured(kind, options, precision) for kind in kinds} for _ in range(options.rounds)]
        middle = {
            kind: [
                statistics.median(r[kind][name] for r in rounds) for name in ("tokens_per_second", "peak_memory_bytes")
            ]
            for kind in kinds
        }
        ratios = [
            statistics.median(r["fsdp"][n] / r["ddp"][n] for r in rounds)
            for n in ("tokens_per_second", "peak_memory_bytes")
        ]
        cells = [f"{speed:,.0f}, {memory / 2**30:.2f}" for speed, memory in middle.values()]
        lines.append(f"| sft {precision} | {' | '.join(cells)} | {ratios[0]:.2f}, {ratios[1]:.2f} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"
    shape = f"{options.layers} layers of {Path(options.model).name}'s shape, random weights"
    told = (
        f"{machine}; {shape}; 8 examples a step, of {options.length} tokens or less; medians of {options.rounds} rounds"
    )
    text = f"{MARK}\n## Two ranks, {date.today().isoformat()}\n\n{told}.\n\n" + "\n".join(lines) + f"\n{MARK}\n"
    print(text)
    if options.write:
        before, _, rest = RESULTS.read_text(encoding="utf-8").partition(MARK)
        RESULTS.write_text(before.rstrip() + "\n\n" + text + rest.partition(MARK)[2].lstrip("\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
