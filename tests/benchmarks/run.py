"""Speed and memory side by side with a peer, in one run, as ratios: writes tests/benchmarks/RESULTS.md.

    make bench BENCH="--model DIR --data alpaca.json"

Each measurement is a process of its own, ours and the peer's by turns, so that both see the same machine. What is compared
must first be shown equal: the losses of the first steps agree to 1 %.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = [("padded", "none"), ("packed", "none"), ("padded", "lora")]
START = "<!-- sft -->"


def measure(peer: str, layout: str, adapter: str, options: Any) -> dict[str, Any]:
    """One process of sft.py."""
    command = [sys.executable, str(HERE / "sft.py"), "--peer", peer, "--model", options.model, "--data", options.data]
    command += ["--layout", layout, "--adapter", adapter, "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{peer:10} {layout} {adapter}: {found['trained_tokens_per_second']:.0f} trained tokens/s, "
          f"{found['peak_memory_gib']:.1f} GiB", flush=True)  # fmt: skip
    return found


def compare(layout: str, adapter: str, options: Any) -> str:
    """A row of the table: medians, the ratio of each round and its spread."""
    # the peer's packing drops the borders between examples on this attention; it is compared unpacked
    rounds = [
        (measure("posttrain", layout, adapter, options), measure("trl", "padded", adapter, options))
        for _ in range(options.rounds)
    ]
    for ours, theirs in rounds:
        pairs = zip(ours["losses"], theirs["losses"], strict=True)
        assert all(abs(a - b) < 0.01 * b for a, b in pairs), (ours["losses"], theirs["losses"])
    speeds = [[found["trained_tokens_per_second"] for found in side] for side in zip(*rounds, strict=True)]
    memory = [[found["peak_memory_gib"] for found in side] for side in zip(*rounds, strict=True)]
    ratios = sorted(a / b for a, b in zip(*speeds, strict=True))
    smaller = statistics.median(a / b for a, b in zip(*memory, strict=True))
    middle = [[statistics.median(side) for side in both] for both in (speeds, memory)]
    return (
        f"| {layout}, {adapter} | {middle[0][0]:.0f} | {middle[0][1]:.0f} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | "
        f"{middle[1][0]:.1f} | {middle[1][1]:.1f} | {smaller:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("POSTTRAIN_SMOLLM2"), help="a transformers directory")
    parser.add_argument("--data", required=True, help="an Alpaca-style JSON file")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = [compare(layout, adapter, options) for layout, adapter in CASES]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    text = f"""{START}
## Fine-tuning against TRL's SFTTrainer, {datetime.date.today()}

{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU; {versions}.
{Path(options.model).name}, bf16 autocast over fp32 weights, batch 8, max_length 512, the same rows in the
same order, {options.steps - 1} timed steps, {options.rounds} rounds by turns. Losses agree to 1 %
at every step. Trained tokens per second, peak resident memory in GiB; medians, and the spread of the ratio.

| layout, adapter | ours | TRL | faster by | our memory | TRL's | ratio |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
{START}"""
    path = HERE / "RESULTS.md"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Measured speed, memory and coverage\n"
    if START in before:
        head, _, tail = before.split(START)
        before = head.rstrip() + "\n" + tail
    path.write_text(before.rstrip() + "\n\n" + text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
