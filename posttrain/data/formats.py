"""Rows → Groups: find out how a file spells its rows, say it, and read them, each error with file, row and column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from posttrain.data.columns import ROLES, Survey, resolve_roles
from posttrain.data.group import Group
from posttrain.data.join import join_prompts
from posttrain.data.readers import Refuse, stop_at
from posttrain.data.rows import Row
from posttrain.data.spellings import FORMATS, SPELLINGS, Spelling
from posttrain.errors import ConfigError, DataError

# What other tools call a role. It only feeds the error's suggestion: the same names mean other things elsewhere.
GUESSES = {
    "prompt": ("question", "query", "instruction", "problem", "input", "user", "context"),
    "completion": ("answer", "response", "output", "solution", "target", "assistant", "completion"),
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body"),
}


@dataclass(frozen=True)
class Detected:
    """How a source spells its rows; roles: role → column; reward_weights: column → weight; survey: what was seen."""

    spelling: Spelling
    roles: dict[str, str]
    reward_weights: dict[str, float]
    survey: Survey
    poorer: str | None = None  # the format that every row has the columns of, where some lack what this one needs

    @property
    def format(self) -> str:
        return self.spelling.format

    def read(self) -> dict[str, str]:
        """role → column for the roles that this spelling reads."""
        wanted = (*self.spelling.needs, *self.spelling.optional)
        return {role: self.roles[role] for role in wanted if role in self.roles}


@dataclass
class Report:
    """What happened to the rows of a source: for the caller to print."""

    rows: int = 0
    groups: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)  # of the first bad rows, max_messages at most
    notes: Counter[str] = field(default_factory=Counter)
    max_messages: int = 10

    def skip(self, message: str) -> None:
        """Count a row that was read and is left out; the first few are listed."""
        self.skipped += 1
        if len(self.messages) < self.max_messages:
            self.messages.append(message)

    def lines(self) -> list[str]:
        """One line a thing to know; none if every row was read as it is."""
        told = [f"{count:,} {what}" for what, count in self.notes.items()]
        if self.skipped:
            told.append(f"{self.skipped:,} of {self.rows:,} rows skipped (data.on_bad_row=skip):")
            told += [f"  {message}" for message in self.messages]
            if self.skipped > len(self.messages):
                told.append(f"  and {self.skipped - len(self.messages):,} more")
        return told


def detect_format(
    survey: Survey,
    format: str = "auto",
    mapping: Mapping[str, str | None] | None = None,
    reward_weights: Mapping[str, float] | None = None,
    source: str = "the data",
) -> Detected:
    """The first spelling whose roles most rows have (if none has most, the one that the most rows have).

    format: data.format. mapping: data.columns, role → column. reward_weights: data.reward_weights, column → weight.
    Rows that then lack a column are bad rows, not another format; so where even one row has what makes the spelling a
    richer one (a completion beside its prompt), the others lack it: a column that is there is not left aside in silence.
    """
    if format != "auto" and format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        tip = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"data.format={format}: accepted: auto, {', '.join(FORMATS)}{tip}")
    found = [name for name in survey.counts if isinstance(name, str)]
    weights = dict(reward_weights or {})
    try:
        roles = resolve_roles(found, mapping)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    if absent := [column for column in weights if column not in found]:
        raise DataError(f"{source}: data.reward_weights names {absent[0]!r}, but the columns are {', '.join(found)}")
    roles = {**{column: column for column in weights}, **roles}
    fitting = [spelling for spelling in SPELLINGS if _fits(spelling, format, roles, weights, survey)]
    if not fitting:
        raise DataError(f"{source}: {_no_format(format, found)}")
    covered = [min((survey.counts[roles[role]] for role in s.needs if role in roles), default=0) for s in fitting]
    most = next((i for i, count in enumerate(covered) if 2 * count > survey.rows), covered.index(max(covered)))
    plain = fitting[most]
    richer = [i for i, s in enumerate(fitting) if covered[i] and set(s.needs) > set(plain.needs)]
    chosen = fitting[max(richer, key=lambda i: covered[i])] if richer else plain
    if weights and chosen.format not in ("groups", "scored"):
        raise DataError(
            f"{source}: data.reward_weights is for the formats groups and scored, but these are {chosen.format}"
        )
    return Detected(chosen, roles, weights, survey, plain.format if chosen.format != plain.format else None)


def _fits(spelling: Spelling, format: str, roles: dict[str, str], weights: dict[str, float], survey: Survey) -> bool:
    if spelling.asked_only if format == "auto" else spelling.format != format:
        return False
    if not all(role in roles or (weights and role == "reward") for role in spelling.needs):
        return False
    if spelling.likely is None:
        return True
    found = [row.get(roles[spelling.needs[-1]]) for row in survey.sample]
    values = [value for value in found if value is not None]
    return bool(values) and 2 * sum(map(spelling.likely, values)) >= len(values)


def _no_format(format: str, found: list[str]) -> str:
    spelled = [", ".join(s.needs) for s in SPELLINGS if s.format == format or (format == "auto" and not s.asked_only)]
    spelled = [needs for needs in spelled if needs != "text_stream"]
    fits = "its columns fit no format" if format == "auto" else f"its columns do not fit data.format={format}"
    guessed = {role: next((n for n in names if n in found), None) for role, names in GUESSES.items()}
    given = " ".join(f"data.columns.{role}={column}" for role, column in guessed.items() if column and column != role)
    tip = f"try {given}" if given else "name them with data.columns, such as data.columns.prompt=NAME"
    return f"{fits}; found: {', '.join(found) or 'none'}; accepted: {' | '.join(spelled)}; {tip}"


def describe(detected: Detected, counted: bool = True) -> str:
    """One line that says what was found: "alpaca: instruction, input, output → prompt_completion, 999 rows".

    counted: the survey saw all rows, so that their number is known.
    """
    counts = list(detected.survey.counts)
    read = dict(sorted(detected.read().items(), key=lambda item: counts.index(item[1])))  # in the file's order
    columns = [column if column in ROLES[role] else f"{role} ← {column}" for role, column in read.items()]
    columns += [f"{column} × {weight:g}" for column, weight in detected.reward_weights.items()]
    rest = [name for name in counts if name not in read.values() and name not in detected.reward_weights]
    rows = f", {detected.survey.rows:,} row{'s' if detected.survey.rows != 1 else ''}" if counted else ""
    unread = f"; kept beside: {', '.join(map(str, rest))}" if rest else ""
    return f"{detected.spelling.name}: {', '.join(columns)} → {detected.format}{rows}{unread}"


def to_groups(
    rows: Iterable[tuple[str, int, dict[str, Any]]],
    detected: Detected,
    on_bad_row: Literal["error", "skip"] = "error",
    report: Report | None = None,
) -> Iterator[Group]:
    """The Groups of (file, row number, row), as `sources.read_all` yields them.

    A row that does not fit is a DataError, or with on_bad_row="skip" counted and listed in the report.
    """
    if "text_stream" in detected.spelling.needs:
        path = next((values["text_stream"] for _, _, values in rows), "the .txt")
        raise DataError(
            f"{path}: a .txt is one stream of text, which only stage=pretrain reads as it is; "
            "to read it as documents give what stands between them, such as data.document_separator='\\n\\n'"
        )
    report = Report() if report is None else report
    groups = _each(rows, detected, on_bad_row, report)
    if detected.spelling.joins:
        groups = join_prompts(groups)
    for group in groups:
        report.groups += 1
        yield group
    if report.skipped and report.skipped == report.rows:
        raise DataError(f"all {report.rows:,} rows were skipped as bad; the first: {report.messages[0]}")


def refuser(on_bad_row: str, report: Report | None = None) -> Refuse:
    """What becomes of a line that is no row: as of a bad row. report: where it is counted, if this reading counts."""

    def skip(number: int, error: DataError) -> None:
        if report is not None:
            report.rows += 1
            report.skip(str(error))

    return skip if on_bad_row == "skip" else stop_at


def _each(
    rows: Iterable[tuple[str, int, dict[str, Any]]], detected: Detected, on_bad_row: str, report: Report
) -> Iterator[Group]:
    used, build = frozenset(detected.read().values()), detected.spelling.build
    for file, number, values in rows:
        report.rows += 1
        try:
            group = build(Row(values, number, file, detected.roles, used, detected.reward_weights, report.notes))
        except DataError as error:
            if on_bad_row != "skip":
                other = f", or data.format={detected.poorer} to leave such columns aside" if detected.poorer else ""
                raise DataError(
                    f"{error}. Fix the row, or set data.on_bad_row=skip to skip and count such rows{other}"
                ) from None
            report.skip(str(error))
            continue
        yield group
