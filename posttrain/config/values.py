"""Values: from what was typed or read to what the schema says, or an error that names key, value and what is allowed."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError

RANGES = {"min": ">=", "above": ">", "max": "<=", "below": "<"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class Typed(str):
    """A value as somebody typed it on the command line: text until the schema says otherwise."""

    __slots__ = ()


class _Misfit(Exception):
    """The value is not of this type."""


def convert(key: str, value: Any, hint: Any, metadata: Mapping[str, Any], default: Any = None) -> Any:
    """The value in the type `hint` and within the ranges of `metadata`. default: what an error suggests."""
    try:
        converted = _fit(value, hint)
    except _Misfit:
        tip = _tip_choice(value, hint) or _tip_default(default, value)
        raise ConfigError(f"{key} must be {describe(hint)}, got {_show(value)}{tip}") from None
    _check_ranges(key, converted, metadata, default)
    return _expand_home(converted) if metadata.get("path") else converted


def describe(hint: Any) -> str:
    """A type in words: `a whole number or null`."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(describe(option) for option in options)
    (option,) = options
    origin, args = get_origin(option), get_args(option)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list of numbers, such as [1, 2]" if args[0] in (int, float) else "a list, such as [a, b]"
    if origin is dict:
        return (
            "a mapping to numbers, such as {key: 1}" if args[1] in (int, float) else "a mapping, such as {key: value}"
        )
    return WORDS.get(option, "a value")


def parse(text: str) -> Any:
    """What was typed as Hydra's grammar reads it, else YAML's for what is in brackets, else the text itself."""
    try:
        override = override_parser().parse_override(f"key={text}")
        if not override.is_sweep_override():
            value = override.value()
            if value is None or isinstance(value, str | bool | int | float | list | dict):
                return value
    except HydraException:
        pass
    if text[:1] + text[-1:] in ("[]", "{}"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            if text[0] == "[":
                return [_unquote(item.strip()) for item in text[1:-1].split(",")]
    return text


def is_set(value: Any) -> bool:
    """Whether a value says something; a typed `null` does not."""
    return value is not None and not (isinstance(value, Typed) and value == "null")


@cache
def override_parser() -> OverridesParser:
    return OverridesParser.create()


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fit(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if type(None) in options and not is_set(value):
        return None
    for option in options:
        try:
            return _fit_one(value, option)
        except _Misfit:
            continue
    raise _Misfit


def _fit_one(value: Any, hint: Any) -> Any:
    if hint is Any:
        return parse(value) if isinstance(value, Typed) else value
    origin, args = get_origin(hint), get_args(hint)
    if hint is str or origin is Literal:
        return _fit_text(value, args)
    if isinstance(value, Typed):
        value = parse(value)
    if origin is list and isinstance(value, list):
        return [_fit(item, args[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        items = value if args[1] is Any else _joined(value)
        return {str(k): _fit(item, args[1]) for k, item in items.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float):
        return _fit_number(value, hint)
    raise _Misfit


def _joined(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A dot in a typed key made a mapping in a mapping: {"self_attn": {"q_proj": 8}} → {"self_attn.q_proj": 8}."""
    joined: dict[str, Any] = {}
    for key, item in mapping.items():
        joined |= _joined(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return joined


def _fit_text(value: Any, choices: tuple[Any, ...]) -> str:
    if isinstance(value, Typed):
        if value[:1] == "[" and value[-1:] == "]" and not os.path.exists(value):
            raise _Misfit  # a list, for keys that take text or a list
        value = _unquote(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not choices:
        value = str(value)  # a YAML file's `revision: 12`
    if not isinstance(value, str) or (choices and value not in choices):
        raise _Misfit
    return str(value)


def _fit_number(value: Any, hint: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _Misfit
    if hint is int and (math.isinf(value) or value != int(value)):
        raise _Misfit
    return hint(value)


def _check_ranges(key: str, value: Any, metadata: Mapping[str, Any], default: Any) -> None:
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, list) and len(value) != metadata.get("length", len(value)):
        raise ConfigError(
            f"{key} must have {metadata['length']} items, got {_show(value)}{_tip_default(default, value)}"
        )
    several = isinstance(value, list | dict)
    items = list(value.values()) if isinstance(value, dict) else value if several else [value]
    for item in items:
        limits = [f"{RANGES[name]} {metadata[name]:g}" for name in RANGES if name in metadata]
        if limits and not _within(item, metadata):
            subject = f"every item of {key}" if several else key
            raise ConfigError(f"{subject} must be {' and '.join(limits)}, got {item:g}{_tip_default(default, value)}")


def _within(value: float, metadata: Mapping[str, Any]) -> bool:
    return (
        value >= metadata.get("min", -math.inf)
        and value <= metadata.get("max", math.inf)
        and ("above" not in metadata or value > metadata["above"])
        and ("below" not in metadata or value < metadata["below"])
    )


def _tip_default(default: Any, value: Any) -> str:
    return "" if default is None or default == value else f"; try {_show(default)}"


def _tip_choice(value: Any, hint: Any) -> str:
    choices = [str(c) for option in _options(hint) if get_origin(option) is Literal for c in get_args(option)]
    near = nearest(str(value), choices)
    return f"; did you mean {near}?" if near else ""


def _show(value: Any) -> str:
    """As a user would type it; `''` for an empty text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "''"


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return str(text[1:-1] if quoted else text)


def _expand_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
