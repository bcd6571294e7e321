"""One row's values fetched by role, each checked as it is fetched."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from posttrain.data.readers import excerpt
from posttrain.errors import DataError


@dataclass(slots=True)
class Row:
    """One row of a file, read by role. Whatever does not fit ends in `fail`: a DataError with file, row and column."""

    values: dict[str, Any]
    number: int
    file: str
    roles: dict[str, str]  # role → column
    used: frozenset[str]  # the columns that the spelling reads
    reward_weights: dict[str, float]  # column → weight, where several columns make the reward
    notes: Counter[str]  # what was done to rows short of refusing them, for the report

    def fail(self, role: str, found: str, accepted: str) -> NoReturn:
        column = self.roles.get(role, role)
        raise DataError(f"{self.file}, row {self.number}, column '{column}': {found}; accepted: {accepted}")

    def get(self, role: str) -> Any:
        """The value, None where the row or the file has none."""
        column = self.roles.get(role)
        return None if column is None else self.values.get(column)

    def need(self, role: str, accepted: str) -> Any:
        value = self.get(role)
        if value is None:
            column, has = self.roles.get(role, role), ", ".join(map(str, self.values))
            found = "found null" if column in self.values else f"missing (this row has: {has or 'nothing'})"
            self.fail(role, found, accepted)
        return value

    def text(self, role: str, accepted: str = "text that is not empty") -> str:
        """Text with something other than white space in it."""
        value = self.need(role, accepted)
        if not isinstance(value, str):
            self.fail(role, shown(value), accepted)
        if not value.strip():
            self.fail(role, f"found empty text ({excerpt(value)})", accepted)
        return value

    def optional_text(self, role: str) -> str:
        """Text, '' where there is none."""
        value = self.get(role)
        if value is not None and not isinstance(value, str):
            self.fail(role, shown(value), "text, or nothing")
        return value or ""

    def number_at(self, role: str, value: Any, accepted: str = "a finite number") -> float:
        """A finite number; text that spells one counts, since csv holds nothing else."""
        try:
            number = math.nan if isinstance(value, list | dict) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(role, shown(value), accepted)
        return number

    def listed(self, role: str, accepted: str) -> list[Any]:
        """A list that is not empty; text that spells one in JSON counts, since csv holds nothing else."""
        value = self.need(role, accepted)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                value = json.loads(value)
            except ValueError:
                self.fail(role, shown(value) + " that is not JSON", accepted)
        if not isinstance(value, list | tuple):
            self.fail(role, shown(value), accepted)
        if not value:
            self.fail(role, "found an empty list", accepted)
        return list(value)

    def numbers(self, role: str, k: int, accepted: str = "a finite number for each response") -> tuple[float, ...]:
        """K finite numbers, one a response."""
        values = self.listed(role, accepted)
        if len(values) != k:
            self.fail(role, f"found {len(values)} values for {k} responses", f"{accepted}, so {k}")
        return tuple(self.number_at(role, value, accepted) for value in values)

    def rest(self) -> dict[str, Any]:
        """The columns that the spelling does not read."""
        return {name: value for name, value in self.values.items() if name not in self.used}


def shown(value: Any) -> str:
    """What was found, as errors put it: the type and the beginning."""
    return "found null" if value is None else f"found {type(value).__name__} ({excerpt(value)})"
