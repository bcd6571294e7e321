"""`posttrain compare RUN RUN [RUN ...]`: is one better? From the runs' records alone; no model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from posttrain.comparison import compare_runs
from posttrain.disk import write_json, writing
from posttrain.errors import ConfigError
from posttrain.report.console import Console
from posttrain.report.numbers import interval, number
from posttrain.report.page import write_comparison
from posttrain.report.verdicts import by_chance
from posttrain.stats import NEITHER, Estimate

SHOWN_CHARS = 100


def compare(argv: list[str]) -> None:
    """Every other run against the first: prints what was found and writes a page."""
    options = _parser().parse_args(argv)
    if len(options.runs) < 2:
        raise ConfigError("compare takes two runs or more: posttrain compare runs/before runs/after")
    if options.resamples is not None and options.resamples < 100:
        raise ConfigError(f"--resamples {options.resamples}: at least 100, such as 10000")
    found = compare_runs(options.runs, options.resamples, options.seed)
    page = Path(options.out).expanduser() if options.out else Path(found["runs"][-1]["path"]) / "compare.html"
    _tell(found, Console())
    with writing(page.parent, "give another --out"):
        write_comparison(found, page)
        if options.json:
            write_json(Path(options.json).expanduser(), found)
    print(f"\nwritten to {page}")


def _tell(found: dict[str, Any], console: Console) -> None:
    baseline = found["runs"][0]
    console.line(
        f"{found['examples']:,} examples, {found['level']:.0%} paired intervals, resampled with seed {found['seed']}; "
        f"baseline {baseline['name']} (step {baseline['step']})"
    )
    for table in found["tables"]:
        console.title(table["run"])
        for row in table["rows"]:
            if row["metric"] not in NEITHER:
                console.line(f"  {row['change']['sentence']}{by_chance(row['change'], row['p_holm'])}")
        header = ["", baseline["name"], table["run"], "difference", "wins/ties/losses", "p", "p (Holm)"]
        console.table("", header, [_row(row) for row in table["rows"]])
    if found["note"]:
        console.line(f"\n{found['note']}")
    for movers in found["movers"]:
        _tell_movers(movers, console)
    if found["differs"]:
        header = ["config", *(run["name"] for run in found["runs"])]
        console.table("what differs", header, [[str(value) for value in row] for row in found["differs"]])
    for warning in found["warnings"]:
        console.line(f"warning: {warning}")


def _row(row: dict[str, Any]) -> list[str]:
    change = row["change"]
    sides = [interval(Estimate(**row[side])) if isinstance(row[side], dict) else "–" for side in ("baseline", "now")]
    told = "–" if change["value"] is None else f"{change['value']:+.3f}"
    told += "" if change["low"] is None else f" [{change['low']:+.3f}, {change['high']:+.3f}]"
    counts = "–" if change["wins"] is None else f"{change['wins']}/{change['ties']}/{change['losses']}"
    p, holm = (number(value) for value in (change["p_value"], row["p_holm"]))
    return [row["metric"], *sides, told, counts, p, holm]


def _tell_movers(movers: dict[str, Any], console: Console) -> None:
    for kind, title in (("losses", "lost most"), ("gains", "gained most")):
        if movers[kind]:
            console.title(f"{movers['run']}: {title} in {movers['metric']}")
        for each in movers[kind]:
            answers = f"  {_short(each['baseline'])} → {_short(each['now'])}" if each["now"] is not None else ""
            console.line(f"  {each['change']:+.3f}  {_short(each['question'])}{answers}")


def _short(text: str | None) -> str:
    """One line of it."""
    line = " ".join((text or "–").split())
    return line if len(line) <= SHOWN_CHARS else line[:SHOWN_CHARS] + f"… ({len(line):,} characters)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain compare", description="Runs against the first of them.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory: its last evaluation; or RUN@STEP")
    parser.add_argument("--out", help="the page (default: compare.html in the last run's directory)")
    parser.add_argument("--json", help="also write all numbers here")
    parser.add_argument("--resamples", type=int, help="of the bootstrap (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser
