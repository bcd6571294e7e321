"""A config as YAML that reads back as the same values."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def dump(config: dict[str, Any]) -> str:
    """Text that looks like a number is quoted, and what looks like an interpolation is escaped."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(config)))


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
