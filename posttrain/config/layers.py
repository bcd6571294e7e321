"""Layers: group choices and flat key → value, from the embedded default, a recipe, or the command line.

A later layer wins. Keys are flat (`data.columns.prompt`), so that a part of a mapping never wipes the rest of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from posttrain.config.folders import Folders, is_global, read_yaml
from posttrain.config.schema import SECTIONS
from posttrain.config.values import Typed, is_set, parse
from posttrain.errors import ConfigError

CHOSEN_BY_NAME = ("stage", "adapter", "optim", "schedule", "precision", "distribution", "log")
"""Groups whose files set `name`; writing `optim.name=x` is the same as `optim=x`."""

GROUPS = (*CHOSEN_BY_NAME, "model", "data")

EXCLUSIVE = (
    ("train.steps", "train.epochs"),
    ("batch.size", "batch.tokens"),
    ("batch.micro_tokens", "batch.micro_size"),
    ("schedule.warmup_steps", "schedule.warmup_fraction"),
    ("run.dir", "run.name"),
)
"""Giving one unsets the other's default; giving both in one place is an error (check.py)."""


@dataclass
class Layer:
    """source: where it stands, in words. choices: group → file. values: flat key → value."""

    source: str
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: Any) -> None:
        """A choice or a value, whichever the key means."""
        group, _, leaf = key.partition(".")
        chosen = group in GROUPS and (not leaf or (leaf == "name" and group in CHOSEN_BY_NAME))
        if chosen and isinstance(value, str):
            self.choices[group] = str(value).strip("'\"")
        elif not leaf and key in (*SECTIONS, "stage") and not isinstance(value, dict):
            raise ConfigError(f"{key} is a section, not a value ({self.source}); set its keys, such as {_example(key)}")
        elif isinstance(value, dict) and value:
            for inner, item in value.items():
                self.add(f"{key}.{inner}", item)
        else:
            self.values[key] = value


def recipe_layer(file: Path, folders: Folders) -> Layer:
    """A complete experiment: keys of any section, a group's name where a file of it is chosen, or Hydra's defaults list."""
    content, layer = read_yaml(file), Layer(str(file))
    layer.choices |= _choices_in(content.pop("defaults", None), file)
    for key, value in content.items():
        layer.add(key, value)
    return layer


def command_layer(items: list[tuple[str, str]]) -> Layer:
    """key=value as typed; `{...}` after a section or a mapping is merged into it."""
    layer = Layer("command line")
    for key, text in items:
        value: Any = Typed(text)
        if text[:1] + text[-1:] == "{}" and isinstance(parse(text), dict):
            value = parse(text)
        layer.add(key, value)
    return layer


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; an empty mapping stays, as a value."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return nested


def put(flat: dict[str, Any], key: str, value: Any) -> None:
    """Set one key: it replaces what is above it (null, {}) and, unless it is an empty mapping, what is below."""
    below = [k for k in flat if k.startswith(f"{key}.")]
    if value == {} and below:
        return
    for other in [*below, *(k for k in flat if key.startswith(f"{k}."))]:
        del flat[other]
    flat[key] = value


def apply(flat: dict[str, Any], layer: Layer) -> None:
    """Put the layer's values over `flat`."""
    for one, other in EXCLUSIVE:
        given = [key for key in (one, other) if is_set(layer.values.get(key))]
        if len(given) == 1:
            put(flat, one if given[0] == other else other, None)
    for key, value in layer.values.items():
        put(flat, key, value)


def group_content(folders: Folders, group: str, choice: str) -> dict[str, Any]:
    """What a choice's file, and the files of its group that it builds on, say; flat and whole keys."""
    file = folders.group_file(group, choice)
    if file is None:
        return {}
    content = read_yaml(file)
    entries = content.pop("defaults", None) or []
    flat: dict[str, Any] = {}
    for entry in entries:
        if isinstance(entry, str) and entry != "_self_":
            flat |= group_content(folders, group, entry)
    return flat | flatten(content if is_global(file) else {group: content})


def implied_choices(folders: Folders, group: str, choice: str) -> dict[str, str]:
    """The other groups that a preset chooses: `override /adapter: lora` in its defaults list."""
    file = folders.group_file(group, choice)
    return {} if file is None else _choices_in(read_yaml(file).get("defaults"), file)


def _choices_in(defaults: Any, file: Path) -> dict[str, str]:
    """Choices of a Hydra defaults list; entries without a group (`_self_`, a sibling file) choose nothing."""
    entries = [entry for entry in defaults or [] if isinstance(entry, dict)]
    found = {str(k).removeprefix("override ").lstrip("/"): v for entry in entries for k, v in entry.items()}
    unknown = [group for group in found if group not in GROUPS]
    if unknown:
        raise ConfigError(f"{file}: defaults names the group {unknown[0]}; the groups are {', '.join(GROUPS)}")
    return {group: str(choice) for group, choice in found.items() if choice is not None}


def _example(section: str) -> str:
    return f"{section}.{fields(SECTIONS[section])[0].name}" if section in SECTIONS else f"{section}.name"
