"""report.html: one file that holds everything, of a run's directory alone, or of a comparison. No script, no network."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain import __version__
from posttrain.disk import write_text, writing
from posttrain.report import answers, charts, tables
from posttrain.report.cautions import cautions
from posttrain.report.compared import view as comparison_view
from posttrain.report.figures.curves import evaluated
from posttrain.report.figures.svg import Easel
from posttrain.report.opening import commands, findings, is_unfinished, sentence
from posttrain.report.recorded import Recorded, read_run
from posttrain.report.untrusted import excerpt, one_line

NAME = "report.html"
WHOLE = 60_000
"""Characters of a config that are shown: all of any config there is."""


def write_report(run_dir: Path, now: datetime | None = None) -> Path:
    """Make RUN/report.html of what the run has recorded so far. now: of a run that goes on, the time it names."""
    path = run_dir / NAME
    html = _environment().get_template("run.html.j2").render(run_view(read_run(run_dir), now))
    with writing(path, "make room, or make it writable"):
        write_text(path, html)
    return path


def write_comparison(comparison: dict[str, Any], path: Path) -> Path:
    """Make the page of a comparison at this path."""
    html = _environment().get_template("compare.html.j2").render(comparison_view(comparison))
    with writing(path, "make room, or give another place"):
        write_text(path, html)
    return path


def run_view(run: Recorded, now: datetime | None = None) -> dict[str, Any]:
    """What the template shows, in words and drawings."""
    drawings = charts.of_run(run, Easel())
    shown, many = answers.chosen(run)
    names = evaluated(run.lines.get("eval") or []) if run.verb != "eval" else []
    config = run.path / "config.yaml"
    text = (
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else json.dumps(run.config, indent=1)
    )
    return {
        "name": run.path.resolve().name,
        "run": run,
        "sentence": sentence(run, now),
        "findings": findings(run),
        "unfinished": is_unfinished(run),
        "results": tables.results(run),
        "level": f"{charts.level(run):.0%}",
        "noise_floor": charts.noise_floor(run),
        "charts": drawings,
        "evaluations": tables.evaluations(run, names) if names else [],
        "evaluated": names,
        "slices": tables.slices(run),
        "answers": shown,
        "answers_open": answers.OPEN,
        "answers_many": many,
        "answer_kinds": answers.counted(run),
        "rollouts": answers.rollouts(run),
        "config": excerpt(text, head=WHOLE),
        "commands": commands(run),
        "environment": _facts(run.environment),
        "facts": [row for row in run.data.get("facts") or [] if isinstance(row, list) and len(row) == 2],
        "lines": run.data.get("lines") or [],
        "counts": _counts(run.data.get("counts") or {}),
        "lost": charts.lost(run),
        "cautions": cautions(run),  # last: by now what cannot be read is known
    }


@cache
def _environment() -> Environment:
    """Everything printed is escaped and made visible, but for our own drawings."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["minus"] = _typeset
    environment.globals["version"] = __version__
    return environment


def _visible(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _typeset(numbers: Any) -> str:
    """A minus before a number as wide as its plus."""
    return re.sub(r"(?<![\w.])-(?=[\d.])|(?<=\de)-(?=\d)", "−", str(numbers))


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages")
    rows = [(name, value) for name, value in environment.items() if name not in ("packages", "command")]
    rows += list(packages.items()) if isinstance(packages, dict) else []
    return [
        (str(name), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in rows
        if value
    ]


def _counts(counts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:,}") for name, value in counts.items() if isinstance(value, int) and value]
