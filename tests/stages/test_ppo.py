"""stage=ppo: what must hold whatever is learned, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError

Run = Callable[..., Any]
PPO = (
    "stage=ppo", "data.train=embedded:prompts:60", "data.eval=embedded:prompts:20:held_out", "stage.rewards=[exact]",
    "stage.max_new_tokens=6", "stage.samples=4", "stage.epochs=2", "batch.size=6", "eval.generate=20", "eval.verifier=exact",
    "eval.max_new_tokens=6", "train.steps=4",
)  # fmt: skip


def lines(run: str, split: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in found if line["split"] == split]


@pytest.mark.parametrize("advantage", ["gae", "group", "leave_one_out", "return"])
def test_a_policy_that_does_not_move_has_ratio_one(run: Run, advantage: str) -> None:
    """lr 1e-30: in every epoch the ratio is 1, nothing is clipped, KL(old || new) is 0; KL to the reference is 0."""
    run(*PPO, f"stage.advantage={advantage}", "optim.lr=1e-30", "stage.minibatches=2", "train.steps=8", "run.dir=r")
    for line in lines("r"):
        assert line["ratio_deviation"] < 1e-5
        assert line["clip_fraction"] == 0
        assert abs(line["approx_kl"]) < 1e-9
        assert abs(line["kl"]) < 1e-9


def test_the_first_update_has_ratio_one_and_the_next_has_not(run: Run) -> None:
    run(*PPO, "run.dir=r", "optim.lr=1e-3")
    first, second, *_ = lines("r")
    assert first["ratio_deviation"] < 1e-5
    assert second["ratio_deviation"] > 1e-4
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert lines("r")[2]["kl"] != 0


@pytest.mark.parametrize("split", [("batch.micro_tokens=1",), ("batch.micro_size=3",), ("batch.layout=packed",)])
def test_the_split_into_forwards_changes_nothing(run: Run, split: tuple[str, ...]) -> None:
    options = (
        *PPO,
        "optim.lr=1e-4",
        "stage.advantage=gae",
        "stage.kl_in=both",
        "stage.entropy_weight=0.01",
        "stage.minibatches=2",
    )
    run(*options, "run.dir=a", "train.steps=4")
    run(*options, *split, "run.dir=b", "train.steps=4")
    for a, b in zip(lines("a"), lines("b"), strict=True):
        for name in ("loss", "grad_norm", "approx_kl", "kl", "entropy", "explained_variance"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-6), name


def test_rewards_that_fail_take_no_part_and_too_many_stop_the_run(run: Run) -> None:
    Path("shaky.py").write_text(
        "def reward(prompts, responses, rows):\n"
        "    return [None if i % 3 == 0 else float(r == row['answer']) for i, (r, row) in enumerate(zip(responses, rows))]\n"
        "def broken(prompts, responses, rows):\n    raise ValueError('no')\n"
    )
    run(*PPO, "stage.rewards=[shaky:reward]", "run.dir=r")
    assert lines("r")[0]["reward_failed"] == pytest.approx(1 / 3)
    assert lines("r", "eval")[0]["reward"]["n"] < 20
    with pytest.raises(
        DataError, match=r"20 of 20 responses could not be rewarded.*shaky:broken raised ValueError: no"
    ):
        run(*PPO, "stage.rewards=[shaky:broken]", "run.dir=s")


def test_every_score_has_an_interval(run: Run) -> None:
    summary = run(*PPO, "run.dir=r")
    for score in (lines("r")[0]["reward"], lines("r", "eval")[0]["reward"], lines("r", "eval")[0]["accuracy"]):
        assert score["low"] <= score["value"] <= score["high"]
    assert lines("r")[0]["reward"]["clusters"] == 6  # prompts, not answers
    assert {"reward", "accuracy"} <= set(summary.changes)
