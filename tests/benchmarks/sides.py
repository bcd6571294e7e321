"""Two sides measured by turns, each in a process of its own: what the benchmarks of preferences and rollouts share."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from run import write

Found = dict[str, Any]
Side = Callable[[Any], Found]


@dataclass(frozen=True)
class Bench:
    """A section of RESULTS.md. file: that defines it. inputs: names of the options that are paths. cases: name → the two sides,
    whose answers hold per_second. said: lines about the conditions. check: told each round's two answers; SystemExit where
    they cannot be compared."""

    file: str
    section: str
    title: str
    inputs: tuple[str, ...]
    cases: dict[str, tuple[Side, Side]]
    said: Callable[[Any], list[str]]
    check: Callable[[Found, Found], None] = lambda ours, other: None

    def main(self, description: str | None) -> None:
        """The command line: all of it, or with --case and --side one measurement."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name in self.inputs:
            parser.add_argument(f"--{name}", required=True)
        parser.add_argument("--steps", type=int, default=4)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--case")
        parser.add_argument("--side", type=int)
        options = parser.parse_args()
        for name in self.inputs:
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
        self._report(options) if options.case is None else self._one(options)

    def _one(self, options: Any) -> None:
        """Prints a line of JSON, and nothing else."""
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = scratch
            said, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
            found = self.cases[options.case][options.side](options)
            sys.stdout = said
        found["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found))

    def _measure(self, options: Any, case: str, side: int) -> Found:
        """One process."""
        command = [
            sys.executable,
            self.file,
            *(w for name in self.inputs for w in (f"--{name}", getattr(options, name))),
        ]
        command += ["--steps", str(options.steps), "--case", case, "--side", str(side)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}, side {side} failed:\n{done.stderr[-2000:]}")
        found: Found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"{case}, side {side}: {found['per_second']:.3f} per second, {found['peak_memory_gib']:.1f} GiB", flush=True
        )
        return found

    def _row(self, options: Any, case: str) -> str:
        """Medians, and the ratios' medians with their smallest and largest."""
        rounds = [(self._measure(options, case, 0), self._measure(options, case, 1)) for _ in range(options.rounds)]
        for ours, other in rounds:
            self.check(ours, other)
        cells = []
        for name, digits in (("per_second", 3), ("peak_memory_gib", 1)):
            sides = [statistics.median(r[i][name] for r in rounds) for i in (0, 1)]
            ratios = sorted(a[name] / b[name] for a, b in rounds)
            cells += [f"{side:.{digits}f}" for side in sides]
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
        return f"| {case} | {' | '.join(cells)} |"

    def _report(self, options: Any) -> None:
        rows = [self._row(options, case) for case in self.cases]
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU; {versions}."
        text = "\n".join([
            f"## {self.title}, {datetime.date.today()}",
            "",
            machine,
            f"{Path(options.model).name}, bf16 autocast over fp32 weights, {options.rounds} rounds by turns.",
            *self.said(options),
            "Peak resident memory in GiB.",
            "",
            "| case | ours | other | times as fast | our memory | other's | times the memory |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ])  # fmt: skip
        write(self.section, text)
        print(text)
