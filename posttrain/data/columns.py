"""Which columns a file has, and which role each plays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from posttrain.errors import DataError

# role → the column names that play it unless data.columns says otherwise
ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "text_stream": ("text_stream",),  # made by data/sources.py for a .txt
    "system": ("system",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "messages": ("messages", "conversations", "conversation"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "response_a": ("response_a",),
    "response_b": ("response_b",),
    "preference": ("preference",),
    "label": ("label",),
    "responses": ("responses",),
    "rewards": ("rewards",),
    "ranks": ("ranks",),
    "target_probs": ("target_probs",),
    "sampler_logprobs": ("sampler_logprobs",),
    "reward": ("reward",),
    "sampler_logprob": ("sampler_logprob",),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


@dataclass
class Survey:
    """What a first pass over the rows sees: how many there are, how many hold each column (not null), and some rows."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    sample: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: Iterable[dict[str, Any]], max_sample: int = 100) -> Survey:
        """Count these rows in too; the first max_sample are kept."""
        counts: Counter[tuple[str, ...]] = Counter()  # by key tuple: a file has few, so this is one hash a row
        for row in rows:
            if len(self.sample) < max_sample:
                self.sample.append(row)
            self.rows += 1
            full = None not in row.values()
            counts[tuple(row) if full else tuple(name for name, value in row.items() if value is not None)] += 1
            if not full:
                self.counts.update(dict.fromkeys(row, 0))
        for names, n in counts.items():
            self.counts.update(dict.fromkeys(names, n))
        return self


def resolve_roles(found: Iterable[str], mapping: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """role → column, for the roles that the columns found can play: data.columns (mapping) merged onto ROLES.

    A column given to one role by the mapping plays no other by its name.
    """
    found = list(found)
    given = {_role(name): column for name, column in (mapping or {}).items() if column is not None}
    for role, column in given.items():
        if column not in found:
            near = get_close_matches(column, found, n=1)
            tip = f"did you mean data.columns.{role}={near[0]}?" if near else "name one of these"
            raise DataError(
                f"data.columns.{role}={column}: no row has that column; found: {', '.join(map(str, found))}; {tip}"
            )
    roles = dict(given)
    for role, names in ROLES.items():
        default = next((name for name in names if name in found and name not in given.values()), None)
        if default is not None:
            roles.setdefault(role, default)
    return roles


def _role(name: str) -> str:
    if name in _ROLE_OF:
        return _ROLE_OF[name]
    near = get_close_matches(name, list(_ROLE_OF), n=1)
    tip = f"did you mean data.columns.{near[0]}?" if near else f"accepted: {', '.join(ROLES)}"
    raise DataError(f"data.columns.{name}: there is no such role; {tip}")
