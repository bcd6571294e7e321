"""fp16's loss scale on a constructed overflow, autocast, and environments that say otherwise than the config."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_run, log
from torch import nn

from posttrain.errors import ConfigError, TrainingError
from posttrain.models.embedded import DIRECTORY
from posttrain.precision import LossScaler, check_environment
from posttrain.runtime import Runtime

Run = Callable[..., Any]
OVERFLOW = 2.0**18
"""The embedded model's gradients, scaled by this, leave fp16's range."""


def trained(run_dir: str) -> list[dict[str, Any]]:
    return [line["metrics"] for line in log(run_dir) if line["split"] == "train"]


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def scaled_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.precision.START_SCALE", OVERFLOW)
    monkeypatch.setattr("posttrain.precision.GROWTH_STEPS", 2)


FP16 = ("precision=fp16", "train.steps=9", "batch.size=2", "train.save_every=1", "train.keep_checkpoints=99",
        "data.eval=embedded:prompt_completion:10:held_out")  # fmt: skip


@pytest.mark.usefixtures("scaled_too_far")
def test_an_overflow_skips_the_step_halves_the_scale_and_then_trains_and_grows(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run(*FP16, "run.dir=r")
    lines = trained("r")
    skipped = [line["skipped_steps"] for line in lines]
    flags = [now > before for before, now in zip([0, *skipped], skipped, strict=False)]
    assert flags[0]
    assert not all(flags)
    scale, good = OVERFLOW, 0
    grew = False
    for line, overflowed in zip(lines, flags, strict=True):  # torch.amp's rule, by hand
        scale, good = (scale / 2, 0) if overflowed else (scale, good + 1)
        if good == 2:
            scale, good, grew = 2 * scale, 0, True
        assert line["loss_scale"] == scale
        assert ("grad_norm" in line) != overflowed
        assert math.isfinite(line["loss"])
    assert grew, "nine steps hold two good ones in a row"
    before = weights(DIRECTORY)
    for step, overflowed in enumerate(flags, 1):
        after = weights(f"r/checkpoints/step-{step:06d}/model")
        assert alike(before, after) == overflowed
        before = after
    state = torch.load("r/checkpoints/step-000009/optimizer.pt", weights_only=True)["state"]
    assert int(state[0]["step"]) == flags.count(False), "a skipped step is none of the optimizer's"
    halved = "step 1: a gradient overflowed fp16, so nothing was updated; loss scale 262,144 -> 131,072"
    assert halved in capfd.readouterr().out


@pytest.mark.usefixtures("scaled_too_far")
def test_resumed_in_the_middle_it_is_the_same_run(run: Run) -> None:
    """The scale, the count of good steps and of skipped ones go on."""
    run(*FP16, "run.dir=whole")
    shutil.copytree("whole", "r")
    for step in range(6, 10):
        shutil.rmtree(f"r/checkpoints/step-{step:06d}")
    shutil.rmtree("r/model")
    Path("r/summary.json").unlink()
    run(*FP16, "run.dir=r")
    assert_same_run("r", "whole")


def test_the_schedule_follows_the_steps_number_whether_skipped_or_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("precision=fp16", "train.steps=3", "batch.size=2", "schedule=linear", "schedule.warmup_steps=0")
    monkeypatch.setattr("posttrain.precision.START_SCALE", 2.0**30)
    run(*options, "run.dir=r", "data.eval=embedded:prompt_completion:4:held_out")
    assert [line["skipped_steps"] for line in trained("r")] == [1, 2, 3]
    assert [line["lr"] for line in trained("r")] == pytest.approx([1e-4, 1e-4 * 2 / 3, 1e-4 / 3])


def test_at_the_smallest_scale_gradients_that_still_overflow_end_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.precision.START_SCALE", 2.0**30)
    monkeypatch.setattr("posttrain.precision.FLOOR_SCALE", 2.0**29)
    with pytest.raises(TrainingError, match=r"loss scale fell to 536,870,912 and gradients are still not finite"):
        run("precision=fp16", "batch.size=2")


def test_a_loss_that_is_not_finite_ends_the_run_at_once(run: Run) -> None:
    """No scale helps there: weights of 1e30 are infinite in fp16."""
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 2.*precision=bf16"):
        run("precision=fp16", "batch.size=2", "optim.lr=1e30", "schedule=constant", "train.save_every=99")


def test_all_ranks_skip_where_one_overflows(posttrain_process: Run) -> None:
    """Only rank 1's backward is spoilt; rank 0 finds it in the norm that they share."""
    spoilt = ["posttrain.precision:LossScaler.scale", 2]
    done = posttrain_process(
        "precision=fp16", "train.steps=3", "batch.size=4", "data.eval=embedded:prompt_completion:4:held_out", "run.dir=r",
        ranks=2, on_rank=1, poison=spoilt,
    )  # fmt: skip
    assert done["statuses"] == [0, 0], done["output"]
    assert [(line["skipped_steps"], line["loss_scale"]) for line in trained("r")] == [
        (0, 65536),
        (1, 32768),
        (1, 32768),
    ]


STAGES = {
    "dpo": ["data.train=embedded:pairs:40", "data.eval=embedded:pairs:6:held_out"],
    "gpro": ["data.train=embedded:groups:40", "data.eval=embedded:groups:6:held_out"],
    "reward": ["data.train=embedded:pairs:40", "data.eval=embedded:pairs:6:held_out"],
    "ppo": ["data.train=embedded:prompts:40", "data.eval=embedded:prompts:6:held_out", "stage.rewards=[exact]",
            "stage.max_new_tokens=3", "stage.samples=2", "stage.epochs=1", "eval.generate=2", "eval.max_new_tokens=2"],
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_in_fp16(run: Run, stage: str) -> None:
    run(f"stage={stage}", *STAGES[stage], "precision=fp16", "train.steps=2", "batch.size=2", "run.dir=r")
    last = trained("r")[-1]
    assert last["loss_scale"] == 65536 / 2 ** last["skipped_steps"]
    assert last["skipped_steps"] < 2
    assert max(line.get("grad_norm", 0) for line in trained("r")) > 0


def test_the_scale_is_settled_by_the_norm_alone() -> None:
    """Finite entries whose norm is not: torch's own check of the entries would have let the step pass."""
    scaler, parameter = LossScaler(torch.device("cpu")), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(parameter.sum()).backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [65536, 65536]
    scaler.unscale(optimizer)
    assert parameter.grad.tolist() == [1, 1]
    scaler.settle(finite=False)
    assert (scaler.value, scaler.state()["_growth_tracker"]) == (32768, 0)
    other = LossScaler(torch.device("cpu"))
    other.load(scaler.state())
    assert other.value == 32768


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_a_wrapped_module_computes_under_autocast_and_so_does_its_copy(precision: str, dtype: torch.dtype) -> None:
    runtime = Runtime(precision, "single")
    module = nn.Linear(4, 4)
    wrapped = runtime.wrap(module)
    assert wrapped(torch.ones(1, 4)).dtype == dtype
    assert module.weight.dtype == torch.float32
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.weight)
    assert not torch.equal(twin(torch.ones(1, 4)), wrapped(torch.ones(1, 4))), "a copy runs its own weights"
    assert (runtime.loss_scaler is not None) == (precision == "fp16")
    assert runtime.accelerator.scaler is None, "one loss scale, not two"


CONTRADICTIONS = [
    ("bf16", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "or set precision=fp16"),
    ("fp16", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "or set precision=bf16"),
    ("fp8", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "or set precision=bf16"),
    ("fp32", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "or set precision=fp8"),
    ("tf32", {"NVIDIA_TF32_OVERRIDE": "0"}, "set precision=fp32"),
    ("fp32", {"NVIDIA_TF32_OVERRIDE": "1"}, "set precision=tf32"),
    ("bf16", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "does not compile"),
]


@pytest.mark.parametrize(("precision", "environment", "words"), CONTRADICTIONS)
def test_an_environment_that_says_otherwise_is_refused(precision: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_environment(precision, environment)
    assert words in str(caught.value)
    assert all(f"{name}={value}" in str(caught.value) for name, value in environment.items())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "fp8"])
def test_what_a_launcher_says_unasked_is_no_contradiction(precision: str) -> None:
    check_environment(precision, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    same = {"fp32": "no", "tf32": "no"}.get(precision, precision)
    check_environment(precision, {"ACCELERATE_MIXED_PRECISION": same, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})


def test_tf32_is_a_mode_of_its_own(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Off by default whatever torch or a container says; and a device that has none is told."""
    matmul = torch.backends.cuda.matmul
    for precision in ("tf32", "fp32"):
        Runtime(precision, "single")
        assert matmul.allow_tf32 == (precision == "tf32")
    if not torch.cuda.is_available():
        run("precision=tf32", "train.steps=1", "run.dir=a")
        assert "tf32 (which is fp32 on this device)" in capfd.readouterr().out
        run("precision=fp32", "train.steps=1", "run.dir=b")
        assert alike(weights("a/model"), weights("b/model"))
        assert json.loads(Path("a/config.json").read_text())["precision"]["name"] == "tf32"


@pytest.mark.gpu
def test_on_a_gpu_fp16_overflows_and_trains_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr("posttrain.precision.START_SCALE", 2.0**30)
    run("precision=fp16", "train.steps=20", "run.dir=r")
    lines = trained("r")
    assert 0 < lines[-1]["skipped_steps"] < 20
    assert lines[-1]["loss_scale"] == 2.0**30 / 2 ** lines[-1]["skipped_steps"]
