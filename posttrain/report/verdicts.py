"""Which scores are shown, in which order, and what is said of a change; the console and the pages say the same."""

from __future__ import annotations

from typing import Any

SHOWN = (
    "accuracy", "pair_accuracy", "best_accuracy", "rank_correlation", "objective", "reward", "reward_sampled", "nll", "nll_best",
    "nll_worst", "perplexity", "bits_per_byte", "token_accuracy", "margin", "reward_chosen", "reward_rejected", "kl", "ece",
    "ece_equal_mass", "brier", "temperature",
)  # fmt: skip
"""Metrics of the final table, in its order; metrics.jsonl has all."""

HEADLINES = ("accuracy", "pair_accuracy", "reward", "objective", "nll")
"""Scores that a reader looks for first, in this order."""

LEVEL = 0.05
"""A change is told as one among many if its p, corrected for their number, is not above this."""

WATCHED = {"ppo": "reward", "gpro": "objective"}
"""By which a stage's best checkpoint is chosen; nll for the others. A page is made where no stage is loaded; data.json says it
of runs that have one."""

UNDECIDED = {"gpro": ("reward",)}
"""Scores of a stage that may move either way while it does what it should."""

_DPO_MARGINS = ("link", "length_normalized", "reference_free")
MEASURED_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "dpo": {"nll": ("beta", *_DPO_MARGINS), "pair_accuracy": _DPO_MARGINS},
    "gpro": {"nll": ("beta",), "objective": ("beta", "form", "link", "target", "z_max", "normalize_rewards")},
    "ppo": {"reward": ("rewards", "reward_weights")},
}
"""Of a stage's headlines the keys stage.* that they are measured with: where those differ, so does what the score is of."""


def watched(stage: str) -> str:
    """The metric by which this stage's best checkpoint is chosen."""
    return WATCHED.get(stage, "nll")


def verdict(change: dict[str, Any] | None) -> str:
    """Better, worse, no detectable change, or nothing where there is no interval to say it by."""
    if change is None or change.get("low") is None:
        return ""
    if change["low"] <= 0 <= change["high"]:
        return "no detectable change"
    return "better" if change.get("better") else "worse"


def holds_up(change: dict[str, Any] | None) -> bool:
    """Whether this slice's change is one among as many slices as there are: Holm's p at the 5 % level."""
    return change is not None and change.get("p_holm") is not None and change["p_holm"] <= LEVEL


def by_chance(change: dict[str, Any], p_holm: float | None) -> str:
    """What is to be added to a finding that the number of comparisons explains; "" for others."""
    detected = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
    return (
        f" (as one of many scores it may be chance: p {p_holm:.2g} by Holm)"
        if detected and p_holm and p_holm > LEVEL
        else ""
    )


def claims_nothing(name: str, start_ece: float | None, start_pair_accuracy: float | None) -> bool:
    """A model that prefers neither response of any pair is never wrong about its confidence: nothing to be worse than."""
    return name in ("ece", "ece_equal_mass") and start_ece == 0.0 and start_pair_accuracy == 0.5
