"""The fitted temperature: from what it is fitted, whether it can be used, and the file that keeps it beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import stats
from posttrain.disk import write_json
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.evaluate import Evaluation

FITTED_TOKENS = 4_096
"""About so many tokens of an evaluation have the sums that a temperature is fitted to: each costs seventeen passes over its
logits, on a CPU as much as reading several tokens."""

FILE = "temperature.json"


def usable(metrics: dict[str, Any]) -> float | None:
    """The fitted temperature; None where there is none, or where the fit ended at the edge of what it searched."""
    found = stats.Estimate(**found) if isinstance(found := metrics.get("temperature"), dict) else found
    return None if found is None or found.low is None else found.value


def write_temperature(directory: Path, found: Evaluation, of: str, fingerprint: str) -> None:
    """temperature.json, where a temperature was fitted. of: "tokens" or "pairs", whose confidence it corrects."""
    if usable(found.metrics) is None:
        return
    told = [name for name in ("temperature", "ece_uncalibrated", "ece_calibrated") if name in found.metrics]
    plain = {name: _plain(found.metrics[name]) for name in told}
    fitted = found.metrics["temperature"]
    losses = {n: _plain(v) for n in ("nll_before", "nll_after") if (v := getattr(fitted, n, None)) is not None}
    write_json(directory / FILE, {**plain, **losses, "of": of, "data_fingerprint": fingerprint})


def read_temperature(directory: Path) -> dict[str, Any] | None:
    """What write_temperature has put there."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}; delete it, the model does not need it") from error


def _plain(estimate: Any) -> dict[str, Any]:
    return dict(estimate) if isinstance(estimate, dict) else dict(estimate.as_dict())
