"""`posttrain report RUN`: the page of what a run has recorded so far, also of one that is still running."""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.report.page import write_report


def report(argv: list[str]) -> None:
    """Write RUN/report.html and say how to open it."""
    options = _parser().parse_args(argv)
    page = write_report(Path(options.run).expanduser())
    print(page)
    print(f"one file, no network: open {page.resolve().as_uri()} in a browser, or copy it anywhere")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain report", description="Write a run's page, RUN/report.html.")
    parser.add_argument("run", help="a run's directory")
    return parser
