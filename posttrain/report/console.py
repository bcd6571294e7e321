"""What a user sees: the plan, one decoded example, progress, the final table, what to type next. Plain lines off a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from posttrain.data.tokens import TokenGroup

MAX_EXAMPLE_CHARS = 1_200
PLAIN_WIDTH = 160
"""Columns of tables where the output is no terminal."""


class Console:
    """Writes to standard output, on rank 0; other ranks are silent."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.terminal = sys.stdout.isatty()
        width = None if self.terminal else PLAIN_WIDTH
        self.rich = RichConsole(quiet=not enabled, highlight=False, width=width)
        self.progress: Progress | None = None

    def line(self, text: str = "") -> None:
        self.rich.print(escape(text), soft_wrap=True)

    def title(self, text: str) -> None:
        self.rich.print(f"\n[bold]{escape(text)}[/bold]")

    def facts(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Two columns: what, and its value."""
        self.title(title)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(f"  {name}", escape(value))
        self.rich.print(table)

    def example(self, group: TokenGroup, tokenizer: Any, title: str = "one example as the model sees it") -> None:
        """One example as the model sees it; trained tokens in colour, or between ⟦ ⟧ where there is none."""
        self.title(f"{title} (trained tokens {'coloured' if self.terminal else 'between ⟦ ⟧'})")
        self.rich.print(decoded(group, tokenizer, self.terminal), soft_wrap=True)

    def start_progress(self, total: int, done: int) -> None:
        if self.terminal and self.enabled:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[told]}"), console=self.rich)
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, completed=done, told="")

    def advance(self, step: int) -> None:
        """Called every step: moves the bar, where there is one."""
        if self.progress:
            self.progress.update(self.task, completed=step)

    def logged(self, step: int, total: int, told: str) -> None:
        """Called every log line: beside the bar, or a line of its own off a terminal."""
        if self.progress:
            self.progress.update(self.task, told=told)
        else:
            self.line(f"step {step}/{total}  {told}")

    def stop_progress(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        self.title(title)
        table = Table(box=None, pad_edge=True, padding=(0, 2))
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.rich.print(table)


def decoded(group: TokenGroup, tokenizer: Any, colour: bool) -> Text:
    """The prompt and its responses, each on a line of its own where there are several; cut in the middle where they are
    long."""
    if not group.count:
        return _marked(group.prompt, [False] * len(group.prompt), tokenizer, colour)
    text = _marked(group.prompt + group.responses[0], [False] * len(group.prompt) + group.masks[0], tokenizer, colour)
    if group.count == 1:
        return text
    text = _marked(group.prompt, [False] * len(group.prompt), tokenizer, colour)
    for k, (response, mask) in enumerate(zip(group.responses, group.masks, strict=True)):
        judged = f"{_judged(group)} {group.standings[k]:g}" if group.standings else f"response {k + 1}"
        text.append(f"\n  [{judged.replace('rank -', 'rank ')}] ").append_text(
            _marked(response, mask, tokenizer, colour)
        )
    return text


def _judged(group: TokenGroup) -> str:
    return "reward" if group.rewards else "preferred with" if group.target_probs else "rank"


def _marked(ids: list[int], targets: list[bool], tokenizer: Any, colour: bool) -> Text:
    text = Text()
    for piece, target in _runs(ids, targets, tokenizer):
        shown = (
            piece
            if len(piece) <= MAX_EXAMPLE_CHARS
            else f"{piece[:600]} […{len(piece) - 1_000:,} characters…] {piece[-400:]}"
        )
        if colour:
            text.append(shown, style="black on green" if target else "dim")
        else:
            text.append(f"⟦{shown}⟧" if target else shown)
    return text


def _runs(ids: list[int], targets: list[bool], tokenizer: Any) -> Iterable[tuple[str, bool]]:
    """Neighbouring tokens of the same kind, decoded together."""
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or targets[stop] != targets[start]:
            yield tokenizer.decode(ids[start:stop]), targets[start]
            start = stop
