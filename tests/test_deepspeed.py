"""distribution=deepspeed: two ranks give what one process does, and go on from each other's checkpoints."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_arguments
from test_ranks import finish, launch
from test_train import LOSSES, STAGES, STEADY, WEIGHTS, assert_same_weights, log, losses

from posttrain import zero
from posttrain.config import resolve
from posttrain.errors import ConfigError

Run = Callable[..., Any]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (pip install 'posttrain[deepspeed]')",
)
COMMON = [*STEADY, "batch.size=7", "batch.micro_tokens=128", "train.keep_checkpoints=9"]
DEEPSPEED = "distribution=deepspeed"


def norms(run_dir: str) -> list[float]:
    return [line["metrics"]["grad_norm"] for line in log(run_dir) if line["split"] == "train"]


def cut_short(run_dir: str, copy: str) -> None:
    """A copy of a run as if it had been killed after its first checkpoint."""
    shutil.copytree(run_dir, copy)
    for part in ("model", "checkpoints/step-000010"):
        shutil.rmtree(Path(copy) / part)
    (Path(copy) / "summary.json").unlink()


@pytest.mark.long
@needs_deepspeed
def test_two_ranks_give_what_one_process_does_and_each_goes_on_from_the_other(run: Run) -> None:
    """max_grad_norm is below the gradients of every step, so that DeepSpeed's own clipping is at work."""
    stages = {"sft": [*STAGES["sft"], "optim.max_grad_norm=0.5"], "lora": STAGES["dpo lora"], "grpo": STAGES["grpo"]}
    for stage, options in stages.items():
        run(*COMMON, *options, f"run.dir=one/{stage}")
    assert min(norms("one/sft")) > 0.5
    cut_short("one/sft", "adopted")
    tasks = {f"two/{stage}": options for stage, options in stages.items()} | {"adopted": stages["sft"]}
    Path("tasks.json").write_text(
        json.dumps(
            [["train", *small_arguments(*COMMON, *given, DEEPSPEED, f"run.dir={d}")] for d, given in tasks.items()]
        )
    )
    status, said = finish(launch(str(ROOT / "tests" / "rank_runs.py"), "tasks.json"))
    assert status == 0, said
    assert said.count("2 processes (DeepSpeed, gloo)") == len(tasks)
    for stage in stages:
        one, two = f"one/{stage}", f"two/{stage}"
        assert losses(two) == pytest.approx(losses(one), rel=LOSSES, abs=LOSSES), stage
        assert norms(two) == pytest.approx(norms(one), rel=1e-4), stage
        assert_same_weights(one, two, WEIGHTS)
    assert_same_weights("one/sft", "adopted", WEIGHTS)  # moments and their count too: a step without them is another
    cut_short("two/sft", "left")
    run(*COMMON, *stages["sft"], "run.dir=left")  # one process, without DeepSpeed
    assert_same_weights("one/sft", "left", WEIGHTS)


@needs_deepspeed
@pytest.mark.usefixtures("mixture")
def test_a_mixture_is_refused(posttrain_process: Run) -> None:
    done = posttrain_process("model.path=mixture", "model.init=config", DEEPSPEED, "run.dir=r")
    assert done["status"] == 2
    assert "distribution=deepspeed with a mixture of experts" in done["output"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["distribution.zero_stage=3"], "distribution.zero_stage=3 .* set distribution=fsdp"),
        (["optim=adamw8bit"], "optim=adamw8bit with distribution=deepspeed"),
        (
            ["stage=ppo", "stage.rewards=[exact]", "stage.critic_warmup=2"],
            "stage.critic_warmup=2 with distribution=deeps",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(small_arguments(DEEPSPEED, *options))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[deepspeed\]'"):
        zero.check_installed()
