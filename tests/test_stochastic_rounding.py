"""AdamW over bf16 weights: rounding that is right in expectation, the textbook step, runs that resume, and refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_optim import Optim, options
from test_resume import assert_same_run
from torch import nn

from posttrain.config import resolve
from posttrain.errors import ConfigError
from posttrain.optim import build_optimizer
from posttrain.stochastic_rounding import AdamWBF16, stochastic_round

Run = Callable[..., Any]
COPIES = 200_000
BF16 = ("optim=adamw_bf16", "model.dtype=bfloat16", "precision=bf16")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("below", [1.0, -1.0, 3.140625, 2.0**-130])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.95])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(below: float, fraction: float) -> None:
    """x = below + fraction·gap is rounded away from zero with probability `fraction`: the mean is x, its standard error
    gap·√(p(1-p)/n). 2^-130 is a subnormal number."""
    bits = torch.tensor(below).view(torch.int32)
    assert bits & 0xFFFF == 0, "a bf16 number"
    above = float((bits + (1 << 16)).view(torch.float32))
    x = (bits + round(fraction * 65536)).view(torch.float32)
    drawn = stochastic_round(x.repeat(COPIES), seeded()).double()
    assert set(drawn.tolist()) == {below, above}
    standard_error = abs(above - below) * (fraction * (1 - fraction) / COPIES) ** 0.5
    assert abs(float(drawn.mean()) - float(x)) < 4 * standard_error
    assert len(set(x.repeat(9).bfloat16().tolist())) == 1, "rounding to nearest gives always the same"


def test_what_bf16_can_hold_is_not_rounded() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, float("inf"), -float("inf")]).bfloat16()
    for seed in range(20):
        assert torch.equal(stochastic_round(x.float(), seeded(seed)), x)


def one(value: torch.Tensor, seed: int = 0, **changes: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    module = nn.Module()
    module.weight = nn.Parameter(value)
    return module.weight, build_optimizer(module, options(Optim, name="adamw_bf16", **changes), seed)


def test_an_update_that_plain_rounding_loses_is_kept_in_expectation() -> None:
    """Bias-corrected AdamW's first step is lr·sign(g): 1 - 1e-4, where bf16's neighbour of 1 is 1 - 2^-8."""
    weight, optimizer = one(torch.ones(COPIES, dtype=torch.bfloat16), lr=1e-4, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 0.25)
    optimizer.step()
    assert float(torch.tensor(1 - 1e-4).bfloat16()) == 1.0
    p = 1e-4 * 2**8
    standard_error = 2**-8 * (p * (1 - p) / COPIES) ** 0.5
    assert abs(float(weight.detach().double().mean()) - (1 - 1e-4)) < 4 * standard_error
    assert set(weight.tolist()) == {1.0, 1 - 2**-8}


def test_a_second_moment_decays_though_a_step_is_less_than_half_of_bf16s() -> None:
    """0.999^100 after 100 steps without a gradient; rounded to nearest it would stay 1 for good."""
    weight, optimizer = one(torch.ones(20_000, dtype=torch.bfloat16), lr=1e-4, weight_decay=0.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    for _ in range(100):
        optimizer.step()
    assert float(optimizer.state[weight]["exp_avg_sq"].double().mean()) == pytest.approx(0.999**100, rel=2e-3)


def test_in_fp32_it_is_torchs_adamw() -> None:
    made = seeded(1)
    start, grads = torch.randn(50, generator=made), torch.randn(6, 50, generator=made)
    ours, optimizer = one(start.clone())
    theirs = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_ranks_round_alike_seeds_and_steps_do_not_and_states_are_bf16() -> None:
    found = []
    for seed in (0, 0, 1):
        weight, optimizer = one(torch.ones(1000, dtype=torch.bfloat16), seed, lr=1e-3)
        torch.manual_seed(len(found))  # what else is random in the process plays no part
        for _ in range(2):
            weight.grad = torch.full_like(weight, 0.25)
            optimizer.step()
        found.append(weight.detach())
        state = optimizer.state[weight]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert isinstance(optimizer, AdamWBF16)
    noise = [torch.randint(0, 99, (50,), generator=optimizer._generator(step, weight)) for step in (1, 2)]
    assert not torch.equal(*noise)


def test_a_run_trains_keeps_half_the_bytes_and_resumes_bit_for_bit(run: Run) -> None:
    steps = ("train.steps=4", "train.save_every=2", "batch.size=4", "train.keep_checkpoints=9", "optim.lr=1e-5",
             "data.eval=embedded:prompt_completion:10:held_out")  # fmt: skip
    run(*BF16, *steps, "run.dir=whole")
    shutil.copytree("whole", "r")
    shutil.rmtree("r/checkpoints/step-000004")
    shutil.rmtree("r/model")
    Path("r/summary.json").unlink()
    run(*BF16, *steps, "run.dir=r")
    assert_same_run("r", "whole")
    saved = load_file("whole/checkpoints/step-000004/model/model.safetensors")
    parameters = sum(tensor.numel() for tensor in saved.values())
    state = torch.load("whole/checkpoints/step-000004/optimizer.pt", weights_only=True)["state"]
    moments = sum(s[name].nbytes for s in state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert sum(tensor.nbytes for tensor in saved.values()) == 2 * parameters
    assert moments == 4 * parameters, "with the gradients' 2 bytes: 8 a parameter"
    before = load_file("whole/checkpoints/step-000002/model/model.safetensors")
    moved = sum(int((saved[name] != before[name]).sum()) for name in saved) / parameters
    assert 0.001 < moved < 0.5, "most weights stay where an update is far below their spacing"


def test_a_score_layer_in_bf16_scores_in_fp32(run: Run) -> None:
    run("stage=reward", *BF16, "data.train=embedded:pairs:40", "data.eval=embedded:pairs:6:held_out", "train.steps=2",
        "batch.size=2", "run.dir=r")  # fmt: skip
    assert load_file("r/checkpoints/step-000002/model/model.safetensors")["score.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim=adamw_bf16"], "model.dtype=auto and precision=fp32; set model.dtype=bfloat16 precision=bf16"),
        (["optim=adamw_bf16", "model.dtype=bfloat16", "precision=fp16"], "precision=fp16; set model.dtype=bfloat16"),
        (
            ["optim=adamw_bf16", "model.dtype=bfloat16", "adapter=lora"],
            "with adapter=lora only the adapter's few weights",
        ),
        (["model.dtype=bfloat16"], "or set optim=adamw_bf16, which rounds at random"),
        (["model.dtype=float16"], "leave model.dtype=auto"),
    ],
)
def test_refused_with_what_to_set(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(arguments)
    assert words in str(caught.value)
