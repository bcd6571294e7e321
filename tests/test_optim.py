"""AdamW against methods.md's numbers, parameter groups, and every schedule at points worked out by hand."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.optim import build_optimizer, learning_rate, parameter_groups, warmup_steps


@dataclass
class Optim:
    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_all: bool = True


@dataclass
class Schedule:
    name: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    min_lr_fraction: float = 0.0
    decay_fraction: float = 0.2


def options(cls: Any, **changes: Any) -> Any:
    return cls(**changes)


def test_one_step_of_adamw_gives_the_textbook_numbers() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
    optimizer = build_optimizer(module, options(Optim))
    module.weight.grad = torch.tensor([0.4, -0.2, 0.1])
    optimizer.step()
    torch.testing.assert_close(module.weight.data, torch.tensor([0.99899, -0.99899, 0.498995]), rtol=0, atol=1e-7)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, rest = parameter_groups(module, 0.1, decay_all=False)
    assert (decayed["weight_decay"], [p.shape for p in decayed["params"]]) == (0.1, [(4, 4)])
    assert (rest["weight_decay"], len(rest["params"])) == (0.0, 4)
    (everything,) = parameter_groups(module, 0.1, decay_all=True)
    assert len(everything["params"]) == 5


def test_a_tied_output_layer_counts_as_the_embedding_it_is() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    (group,) = parameter_groups(nn.Sequential(embedding, head), 0.1, decay_all=False)
    assert group["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(4, 4)
    module.weight.requires_grad_(False)
    (group,) = parameter_groups(module, 0.1, decay_all=False)
    assert group["params"] == [module.bias]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant"), {0: 1.0, 50: 1.0, 99: 1.0}),
        (Schedule("linear"), {0: 1.0, 50: 0.5, 99: 0.01}),
        (Schedule("linear", min_lr_fraction=0.2), {0: 1.0, 50: 0.6}),
        (Schedule("cosine"), {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2}),
        (Schedule("cosine", min_lr_fraction=0.1), {50: 0.55}),
        (Schedule("cosine", warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5}),
        (Schedule("linear", warmup_fraction=0.1), {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5}),
        (Schedule("wsd"), {0: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        (Schedule("wsd", warmup_steps=4), {0: 0.25, 3: 1.0, 90: 0.5}),
    ],
)
def test_the_rate_of_a_step(schedule: Schedule, expected: dict[int, float]) -> None:
    found = {step: learning_rate(step, 100, 2.0, schedule) / 2 for step in expected}  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


def test_warmup_steps_win_over_their_share() -> None:
    assert warmup_steps(100, Schedule(warmup_steps=0, warmup_fraction=0.5)) == 0  # type: ignore[arg-type]
    assert warmup_steps(101, Schedule(warmup_fraction=0.03)) == 4  # type: ignore[arg-type]


def test_eight_bit_moments_step_as_adamw_does_but_for_rounding() -> None:
    torch.manual_seed(0)
    start, grad, moved = torch.randn(128, 64), torch.randn(128, 64), []
    for name in ("adamw", "adamw8bit"):
        module = nn.Linear(64, 128, bias=False)
        module.weight.data.copy_(start)
        optimizer = build_optimizer(module, options(Optim, name=name))
        for _ in range(3):
            module.weight.grad = grad.clone()
            optimizer.step()
        moved.append(module.weight.data - start)
        if name == "adamw8bit":
            assert optimizer.state[module.weight]["state1"].dtype == torch.uint8
    assert float((moved[0] - moved[1]).abs().mean() / moved[0].abs().mean()) < 0.05


def test_paged_moments_need_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"optim.name=paged_adamw8bit .* use adamw8bit"):
        build_optimizer(nn.Linear(4, 4), options(Optim, name="paged_adamw8bit"))
