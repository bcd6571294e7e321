"""The schema's verdict on composed keys and values: unknown keys with the nearest real one, types, ranges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from posttrain.config.layers import GROUPS
from posttrain.config.suggest import nearest_key
from posttrain.config.values import convert
from posttrain.errors import ConfigError


def judge(flat: Mapping[str, Any], origins: Mapping[str, str], schemas: Mapping[str, type], stage: str = "") -> None:
    """ConfigError for the first key that is no key; what stands under a mapping is not judged here."""
    for key in flat:
        section, _, rest = key.partition(".")
        if section == "stage" and "stage" not in schemas:
            continue
        fields = hints(schemas[section]) if section in schemas else {}
        name, _, inner = rest.partition(".")
        if name in fields and (not inner or _is_mapping(fields[name])):
            continue
        raise ConfigError(_unknown(key, origins.get(key, ""), schemas, flat, stage))


def _unknown(key: str, source: str, schemas: Mapping[str, type], flat: Mapping[str, Any], stage: str) -> str:
    place = where(source)
    keys = [f"{section}.{name}" for section, schema in schemas.items() for name in hints(schema)]
    if stage:
        of = f"of stage={stage}, whose keys are {', '.join(keys)}"
    else:
        of = "of the configuration"
        keys += [k for k in flat if k.startswith("stage.")] + list(GROUPS) + ["recipe"]
    parent = key.rpartition(".")[0]
    if "." in parent and parent in keys:
        return f"{key} is not a key{place}: {parent} holds one value"
    near = nearest_key(key, keys)
    tip = f"; did you mean {near}?" if near else "; posttrain train --help lists them all"
    return f"{key} is not a key {of}{place}{tip}"


def where(source: str) -> str:
    """` (in FILE)`, or nothing where the user has just typed it."""
    return "" if source in ("", "command line") else f" (in {source})"


@functools.cache
def hints(schema: type) -> dict[str, Any]:
    """Field name → type."""
    names = {f.name for f in dataclasses.fields(schema)}
    return {name: hint for name, hint in get_type_hints(schema).items() if name in names}


def _is_mapping(hint: Any) -> bool:
    return any(get_origin(option) is dict for option in (hint, *get_args(hint)))


def build(
    section: str, schema: type, values: Mapping[str, Any], defaults: Mapping[str, Any], origins: Mapping[str, str]
) -> Any:
    """An instance of the section's dataclass, every value converted and within its range."""
    types, built = hints(schema), {}
    for field in dataclasses.fields(schema):
        key = f"{section}.{field.name}"
        if field.name not in values:
            continue  # a stage's own default
        try:
            built[field.name] = convert(
                key, values[field.name], types[field.name], field.metadata, defaults.get(field.name)
            )
        except ConfigError as error:
            raise ConfigError(f"{error}{where(origins.get(key, ''))}") from None
    return schema(**built)
