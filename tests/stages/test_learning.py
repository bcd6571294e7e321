"""Each preference stage, and a bottleneck adapter, on the embedded model with its own defaults, in fewer steps: better, and the
interval says so."""

from typing import Any

import pytest

import posttrain

pytestmark = pytest.mark.usefixtures("warm_process")
FEW = ["train.eval_every=1000", "eval.resamples=500", "train.log_every=20"]
CASES = {
    "dpo": (["stage=dpo", "train.steps=60", "eval.generate=200"], "accuracy", 0.1),
    "gpro": (["stage=gpro", "train.steps=30", "eval.generate=200"], "accuracy", 0.1),
    "bottleneck": (["stage=sft", "adapter=bottleneck", "train.steps=60", "eval.generate=200"], "accuracy", 0.1),
    "reward": (["stage=reward", "train.steps=150"], "pair_accuracy", 0.05),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_the_interval_excludes_the_start(case: str) -> None:
    options, score, least = CASES[case]
    summary: Any = posttrain.run([*options, *FEW, "run.dir=r"])
    change = summary.changes[score]
    assert change["better"] is True
    assert change["low"] > 0
    assert change["value"] > least
