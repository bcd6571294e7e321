"""A training step in bf16 and in fp8, by turns: tokens per second, and the share of the device's arithmetic that they are (MFU).

    make bench-precision BENCH=--write            # on a GPU: about 1 B parameters, and layers wide enough for fp8
    make bench-precision BENCH="--shapes tiny --emulate --steps 3"      # that it runs, without one

Random weights and generated text, so nothing is downloaded: pretrain, full fine-tuning, AdamW with fp32 masters, documents
packed to forwards of --tokens. Each measurement is a process of its own. FLOPs of a token: 6 for each weight that multiplies
(the output layer too, the embedding not), and 6 · layers · width · tokens of causal attention (PaLM, arXiv:2204.02311, app. B, of
whose attention a causal mask leaves half). MFU is of the device's dense bf16 peak, for fp8 too, so that the two compare.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from run import write

SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32_000},
    "wide": {"hidden_size": 5120, "intermediate_size": 14_336, "num_hidden_layers": 4, "num_attention_heads": 40,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32_000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
}  # fmt: skip
PRECISIONS = {
    "bf16": ["precision=bf16"],
    "fp8 tensorwise": ["precision=fp8", "precision.recipe=tensorwise"],
    "fp8 rowwise": ["precision=fp8", "precision.recipe=rowwise"],
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOPs a second, of the vendor's data sheets (SXM where there are several)."""


def weights_that_multiply(shape: dict[str, int]) -> int:
    """Of the layers' linear modules and the output layer."""
    width, heads, head = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    attention = width * head * (2 * heads + 2 * shape["num_key_value_heads"])
    return (
        shape["num_hidden_layers"] * (attention + 3 * width * shape["intermediate_size"]) + width * shape["vocab_size"]
    )


def flops_a_token(shape: dict[str, int], length: int) -> float:
    """Forward and backward; a token attends to half of the row on average."""
    attention = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * length
    return 6.0 * weights_that_multiply(shape) + 6.0 * attention


def peak_of(name: str) -> float | None:
    """FLOPs a second of the device of this name; None where they are not known."""
    return next((peak for kind, peak in PEAKS.items() if kind in name), None)


def write_text(path: Path, length: int, documents: int) -> None:
    """Documents longer than `length` tokens: sums, for the embedded tokenizer reads a character a token."""
    sums = (f"{a}+{b}={a + b} " for a in range(10, 100) for b in range(10, 100))
    line = "".join(sums)
    with path.open("w", encoding="utf-8") as file:
        for i in range(documents):
            start = 997 * i % (len(line) - length - 1)
            file.write(json.dumps({"text": line[start : start + length - 1]}) + "\n")


def measured(shape: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """summary.json of a short run, and the device."""
    with tempfile.TemporaryDirectory() as scratch:
        data, steps = Path(scratch) / "text.jsonl", options.steps
        write_text(data, options.length, 64)
        settings = {
            "stage": "pretrain", "model.path": "embedded", "model.init": "config", "data.train": data, "data.eval_fraction": 0,
            "data.max_length": options.length, "batch.size": options.rows, "batch.micro_tokens": options.tokens,
            "batch.layout": "packed", "train.epochs": "null", "train.steps": steps, "train.log_every": steps,
            "train.save_every": 10 * steps, "log.report": "false", "eval.generate": 0, "run.dir": f"{scratch}/run",
            "train.gradient_checkpointing": "false", "model.config.max_position_embeddings": options.length,
            **{f"model.config.{key}": value for key, value in SHAPES[shape].items()},
        }  # fmt: skip
        command = [sys.executable, "-m", "posttrain", *(f"{key}={value}" for key, value in settings.items())]
        command += PRECISIONS[precision] + (
            ["precision.emulate=true"] if options.emulate and precision != "bf16" else []
        )
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"XDG_CACHE_HOME": scratch}
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads((Path(scratch) / "run" / "summary.json").read_text(encoding="utf-8"))
        print(f"{shape:6}{precision:16}{found['tokens_per_second']:>12,.0f} tokens/s", file=sys.stderr, flush=True)
        return found


def section(options: argparse.Namespace) -> str:
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    )
    peak = peak_of(name)
    lines = [
        f"## bf16 and fp8, {datetime.date.today()}",
        "",
        f"{name}; torch {version('torch')}, torchao {version('torchao')}, transformers {version('transformers')}"
        f"{', fp8 emulated' if options.emulate else ''}.",
        f"Random weights, full fine-tuning; rows of {options.length:,} tokens, {options.rows} a step, packed to forwards of "
        f"{options.tokens:,}; {options.steps} steps, the first left out; medians of {options.rounds} rounds by turns.",
        "",
        "| shape | parameters that multiply | precision | tokens/s | times bf16 | MFU of bf16's peak | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        rounds = [{p: measured(shape, p, options) for p in options.precisions} for _ in range(options.rounds)]
        flops = flops_a_token(SHAPES[shape], options.length)
        for precision in options.precisions:
            speed = statistics.median(r[precision]["tokens_per_second"] for r in rounds)
            memory = statistics.median(r[precision]["peak_memory_bytes"] for r in rounds) / 2**30
            ratio = statistics.median(
                r[precision]["tokens_per_second"] / r[options.precisions[0]]["tokens_per_second"] for r in rounds
            )
            share = "–" if peak is None else f"{speed * flops / peak:.1%}"
            size = f"{weights_that_multiply(SHAPES[shape]) / 1e6:,.1f} M"
            lines.append(f"| {shape} | {size} | {precision} | {speed:,.0f} | {ratio:.2f} | {share} | {memory:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "wide"], choices=SHAPES)
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="the first is the measure"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", type=int, default=8192, help="of a forward")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--emulate", action="store_true", help="fp8 without the hardware for it: slow, to see that it runs"
    )
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    options = parser.parse_args()
    text = section(options)
    print(text)
    if options.write:
        write("precision", text)


if __name__ == "__main__":
    main()
