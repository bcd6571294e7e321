"""Memory of streamed data over ten times as much of it: writes its section of tests/benchmarks/RESULTS.md.

    python tests/benchmarks/streaming.py --model DIR

Text is generated, written to a temporary folder, and read through once as a run reads it: tokenised, shuffled by the buffer and
made into steps of tensors; there is no model, whose memory would hide what is measured. Each measurement is a process of its
own, and its peak is what the operating system says of it. That each example came once is counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MARK = "<!-- streaming -->"
BUFFER = 2_000
MIB = 2**20


def generate(path: Path, megabytes: int) -> int:
    """Documents of 50 to 1,000 made-up words; returns how many."""
    draw = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    words = np.array(["".join(draw.choice(syllables, draw.integers(1, 5))) for _ in range(5_000)])
    count = written = 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            text = " ".join(draw.choice(words, draw.integers(50, 1_000)))
            line = (text if path.suffix == ".txt" else json.dumps({"text": f"{count} {text}"})) + "\n"
            written, count = written + len(line), count + 1
            file.write(line)
    return count


def read(path: str, model: str) -> dict[str, Any]:
    """One epoch, in this process."""
    from posttrain.config import resolve
    from posttrain.data.packing import Packing
    from posttrain.data.streaming.prepare import prepare_stream
    from posttrain.data.streaming.stream import StreamLoader
    from posttrain.models.load import load_tokenizer

    cfg = resolve(["stage=pretrain", f"model.path={model}", f"data.train={path}", "data.streaming=true", "train.steps=1",
                   f"data.shuffle_buffer={BUFFER}", f"data.cache={Path(path).parent / 'cache'}"], "plan")  # fmt: skip
    stream = prepare_stream(cfg.data, load_tokenizer(cfg.model), cfg.stage, cfg.train.seed).stream
    assert stream is not None
    before, began = peak(), time.monotonic()
    for _ in StreamLoader(stream, Packing("padded", 4_096), 32, None).steps(0, sys.maxsize):
        if stream.feeds[0].epoch:  # the last block is not full, so reading it has come to the epoch's end
            break
    return {"peak_mib": peak() / MIB, "before_mib": before / MIB, "seconds": time.monotonic() - began,
            "examples": stream.tally.examples, "held_out": stream.tally.held_out,
            "groups": stream.tally.counts.groups}  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path, model: str) -> dict[str, Any]:
    """One process."""
    command = [sys.executable, __file__, "--read", str(path), "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows(options: Any, folder: Path) -> list[str]:
    """A row a kind of file and size."""
    told = []
    for kind in ("jsonl", "txt"):
        for megabytes in (options.megabytes, 10 * options.megabytes):
            path = folder / f"{megabytes}.{kind}"
            documents = generate(path, megabytes)
            found = measure(path, options.model)
            counted = f"{found['examples']:,} + {found['held_out']:,}"
            if kind == "jsonl":
                assert found["groups"] + found["held_out"] == documents, "each document once"
                counted += f" (of {documents:,} documents)"
            told.append(
                f"| .{kind} | {megabytes:,} | {counted} | {found['before_mib']:.0f} | {found['peak_mib']:.0f} | "
                f"{megabytes / found['seconds']:.1f} |"
            )
            print(told[-1], flush=True)
            path.unlink()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("POSTTRAIN_SMOLLM2"), help="its tokenizer is used")
    parser.add_argument("--megabytes", type=int, default=25, help="of the smaller file")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = rows(options, Path(folder))
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "pyarrow"))
    text = f"""{MARK}
## Memory of streamed data, {datetime.date.today()}

{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}.
One epoch of generated text, tokenised by {Path(options.model).name}'s tokenizer, data.max_length=1024,
data.shuffle_buffer={BUFFER}, steps of 32 made into tensors; no model. Resident memory in MiB: before the first step (libraries,
tokenizer, evaluation set), and the peak. Examples: trained on + held out.
The machine was shared while this ran, so MB/s is a lower bound.

| file | MB | examples | before | peak | MB/s |
|---|---|---|---|---|---|
{chr(10).join(found)}
{MARK}"""
    path = HERE / "RESULTS.md"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Measured speed, memory and coverage\n"
    if MARK in before:
        head, _, tail = before.split(MARK)
        before = head.rstrip() + "\n" + tail
    path.write_text(before.rstrip() + "\n\n" + text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
