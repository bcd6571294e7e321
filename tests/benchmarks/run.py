"""Speed and memory side by side with a peer, in one run, as ratios: writes tests/benchmarks/RESULTS.md.

    make bench BENCH="--model DIR --data alpaca.json"

Each measurement is a process of its own, ours and the peer's by turns, so that both see the same machine. What is compared
must first be shown equal: the losses agree to 1 % at every step. A file beside this one with TITLE, CASES and the peers
`posttrain` and `trl` is one more benchmark (--stage); each has its own section of the results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
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
RESULTS = HERE / "RESULTS.md"
TOKENISATIONS = 5
"""Rounds of tokenisation, which takes half a second: a single one says little."""
Round = list[tuple[dict[str, Any], dict[str, Any]]]
"""Ours and the peer's, of each round."""


def measure(peer: str, layout: str, adapter: str, steps: int, options: Any) -> dict[str, Any]:
    """One process of the stage's own file; no steps: tokenisation alone."""
    command = [sys.executable, str(HERE / f"{options.stage}.py"), "--peer", peer, "--model", options.model]
    command += ["--data", options.data, "--layout", layout, "--adapter", adapter, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    told = ", ".join(f"{name} {value:,.2f}" for name, value in found.items() if isinstance(value, float))
    print(f"{peer:10}{f'{layout} {adapter}' if steps else 'tokenisation':14}{told}", flush=True)
    return found


def rounds(cases: list[tuple[str, str]], steps: int, options: Any) -> dict[tuple[str, str], Round]:
    """Ours and the peer's by turns, and their losses shown equal; the peer once a round for all layouts of an adapter. It is
    always padded: its packing drops the borders between examples on the attention that a processor has."""
    found: dict[tuple[str, str], Round] = {case: [] for case in cases}
    for _ in range(options.rounds if steps else TOKENISATIONS):
        theirs: dict[str, dict[str, Any]] = {}
        for layout, adapter in cases:
            ours = measure("posttrain", layout, adapter, steps, options)
            if adapter not in theirs:
                theirs[adapter] = measure("trl", "padded", adapter, steps, options)
            found[layout, adapter].append((ours, theirs[adapter]))
            if steps:
                check_equal(ours["losses"], theirs[adapter]["losses"])
    return found


def check_equal(ours: list[float], theirs: list[float]) -> None:
    if not all(abs(a - b) < 0.01 * b for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"the losses differ, so nothing can be compared:\n{ours}\n{theirs}")


def cells(found: Round, name: str, digits: int = 0) -> str:
    """Ours, the peer's, and their ratio: medians over the rounds, the ratio with its smallest and largest."""
    sides = [statistics.median(each[side][name] for each in found) for side in range(2)]
    ratios = sorted(ours[name] / theirs[name] for ours, theirs in found)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"{sides[0]:,.{digits}f} | {sides[1]:,.{digits}f} | {spread}"


def profile(found: dict[str, Round]) -> list[str]:
    """A column a case: the median share of each part of our steps, in percent."""
    names = list(next(iter(found.values()))[0][0]["profile"])
    lines = [f"| part of our step, % | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name in names:
        shares = [statistics.median(ours["profile"][name] for ours, _ in each) for each in found.values()]
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |")
    return lines


def section(options: Any) -> str:
    """One stage's part of the results."""
    stage = importlib.import_module(options.stage)
    tokens = rounds([("padded", "none")], 0, options)["padded", "none"]
    found = {f"{a}, {b}": each for (a, b), each in rounds(stage.CASES, options.steps, options).items()}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    table = [f"| {case} | {cells(f, 'trained_tokens_per_second')} | {cells(f, 'peak_memory_gib', 1)} |"
             for case, f in found.items()]  # fmt: skip
    return "\n".join([
        f"## {stage.TITLE}, {datetime.date.today()}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU; {versions}.",
        f"{Path(options.model).name}, bf16 autocast over fp32 weights, batch 8, max_length 512, the same rows in the same",
        f"order, {options.steps - 1} timed steps of wall time, {options.rounds} rounds by turns, TRL always padded. Losses agree",
        "to 1 % at every step. Trained tokens per second and the process's peak resident memory in GiB: medians; ratios ours",
        "to TRL's, with the smallest and the largest of the rounds.",
        "",
        "| layout, adapter | tokens/s | TRL's | times as fast | memory | TRL's | times the memory |",
        "|---|---|---|---|---|---|---|",
        *table,
        "",
        "| tokenisation | rows/s | TRL's | times as fast |",
        "|---|---|---|---|",
        f"| all rows of the file, {TOKENISATIONS} rounds | {cells(tokens, 'rows_per_second')} |",
        "",
        *profile(found),
    ])  # fmt: skip


def write(stage: str, text: str) -> None:
    """Between the stage's markers; other sections stay as they are."""
    mark = f"<!-- {stage} -->"
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured speed, memory and coverage\n"
    head, _, rest = before.partition(mark)
    _, _, tail = rest.partition(mark)
    parts = [head.strip(), f"{mark}\n{text}\n{mark}", tail.strip()]
    RESULTS.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="sft", help="the file beside this one that measures")
    parser.add_argument("--model", default=os.environ.get("POSTTRAIN_SMOLLM2"), help="a transformers directory")
    parser.add_argument("--data", required=True, help="a JSON file of rows")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.model:
        parser.error("--model names no directory, and POSTTRAIN_SMOLLM2 is not set")
    text = section(options)
    write(options.stage, text)
    print(text)


if __name__ == "__main__":
    main()
