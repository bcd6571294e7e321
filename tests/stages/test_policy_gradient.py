"""The equations of ppo against numbers worked out by hand (the method page's vectors)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.stages.policy_gradient import (
    clipped_surrogate,
    discounted_returns,
    gae,
    group_advantages,
    leave_one_out_advantages,
    shaped_rewards,
    value_loss,
)

T = torch.tensor


def row(*values: float) -> Tensor:
    return T([values], dtype=torch.float64)


def test_gae_of_a_terminal_reward() -> None:
    rewards, values = row(0, 0, 0, 1), row(0, 0, 0, 1)
    _, returns = gae(rewards, values, torch.ones(1, 4), 0.9, 0.95)
    assert returns[0].tolist() == pytest.approx([0.65792, 0.7695, 0.9, 1], abs=1e-5)


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    advantages, _ = gae(row(0, 0, 5), row(1, 2, 3), torch.ones(1, 3), 1.0, 0.0)
    assert advantages[0].tolist() == [1, 1, 2]


def test_gae_without_discount_is_return_minus_value() -> None:
    advantages, _ = gae(row(0, 0, 0, 1), torch.full((1, 4), 0.5).double(), torch.ones(1, 4), 1.0, 1.0)
    assert advantages[0].tolist() == [0.5] * 4


def test_rewards_with_a_penalty_and_their_advantages() -> None:
    mask = torch.ones(1, 3)
    rewards = shaped_rewards(row(-1, -2, -1.5), row(-1.2, -1.9, -1.5), T([1.0]), mask, 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.02, 0.01, 1])
    advantages, returns = gae(rewards, row(0.2, 0.3, 0.4), mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.726, 0.68, 0.6])
    assert returns[0].tolist() == pytest.approx([0.926, 0.98, 1])


@pytest.mark.parametrize("junk", [0.0, 7.0, -1e6])
def test_masked_steps_change_nothing(junk: float) -> None:
    """In front, in the middle (a tool's answer), and behind."""
    mask = T([[0, 1, 1, 0, 1, 0]]).bool()
    dense = row(0.1, -0.2, 0.5), row(0.3, 0.6, -0.1)
    sparse = [torch.full((1, 6), junk).double().masked_scatter(mask, part) for part in dense]
    expected, returns = gae(*dense, torch.ones(1, 3), 0.9, 0.8)
    found, targets = gae(*sparse, mask, 0.9, 0.8)
    assert found[mask].tolist() == pytest.approx(expected[0].tolist())
    assert targets[mask].tolist() == pytest.approx(returns[0].tolist())
    assert not found[~mask].any()
    shaped = shaped_rewards(sparse[0], sparse[1], T([2.0]), mask, 1.0)
    assert shaped[mask].tolist() == pytest.approx([0.2, 0.8, -0.6 + 2.0])  # on the last real token, not the last column
    assert not shaped[~mask].any()


def test_returns_are_sums_of_what_is_to_come() -> None:
    mask = T([[1, 1, 0, 1]])
    assert discounted_returns(row(1, 2, 99, 4), mask, 0.5)[0].tolist() == [1 + 1 + 1, 2 + 2, 0, 4]


def test_group_advantages() -> None:
    scores = T([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    std = math.sqrt(1 / 3)  # unbiased
    found = group_advantages(scores)
    assert found[0].tolist() == pytest.approx([x / (std + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)])
    assert found[1].tolist() == [0.0] * 4


def test_rounding_makes_no_advantage() -> None:
    """Equal rewards whose mean rounds: 0, not noise divided by a tiny deviation."""
    assert not group_advantages(torch.full((1, 3), 0.1)).any()


def test_leave_one_out() -> None:
    found = leave_one_out_advantages(T([[3.0, 0.0, 6.0]]))
    assert found[0].tolist() == pytest.approx([3 - 3, 0 - 4.5, 6 - 1.5])


def test_a_failed_reward_takes_no_part() -> None:
    nan = float("nan")
    assert group_advantages(T([[1.0, nan, 0.0]]))[0].tolist() == pytest.approx(
        [*group_advantages(T([[1.0, 0.0]]))[0].tolist()[:1], 0.0, *group_advantages(T([[1.0, 0.0]]))[0].tolist()[1:]]
    )
    assert leave_one_out_advantages(T([[1.0, nan, 0.0]]))[0].tolist() == [1.0, 0.0, -1.0]
    assert leave_one_out_advantages(T([[1.0, nan]]))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, -1.2), (-1.0, math.e)])
def test_the_clipped_surrogate(advantage: float, expected: float) -> None:
    loss, ratio = clipped_surrogate(T([0.0]), T([-1.0]), T([advantage]), 0.2)
    assert (loss.item(), ratio.item()) == pytest.approx((expected, math.e), rel=1e-5)


def test_a_dual_clip_bounds_what_was_bad() -> None:
    loss, _ = clipped_surrogate(T([0.0, 0.0]), T([-3.0, -3.0]), T([-1.0, 1.0]), 0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2])


def test_a_ratio_is_never_infinite() -> None:
    loss, ratio = clipped_surrogate(T([0.0]), T([-500.0]), T([-1.0]), 0.2)
    assert torch.isfinite(loss).all()
    assert ratio.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_the_critics_loss_has_no_half_and_may_be_clipped() -> None:
    values, old, returns = T([1.0, 2.0]), T([0.0, 0.0]), T([3.0, 1.9])
    assert value_loss(values, old, returns, None).tolist() == pytest.approx([4.0, 0.01])
    assert value_loss(values, old, returns, 0.5).tolist() == pytest.approx([6.25, 1.96])


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_bandit_reaches_the_tilt(kl_in: str) -> None:
    """Three actions, one-token responses, expectations exact: the optimum is π_ref e^{r/β} / Z = [.179, .292, .529]."""
    reference, rewards, beta = T([0.5, 0.3, 0.2]).double(), T([0.0, 0.5, 1.0]).double(), 0.5
    tilt = reference * (rewards / beta).exp()
    tilt /= tilt.sum()
    assert tilt.tolist() == pytest.approx([0.179, 0.292, 0.529], abs=1e-3)
    theta = reference.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=0.02)
    for _ in range(200):
        old = theta.detach().log_softmax(0)
        in_reward = beta if kl_in == "reward" else 0.0
        each = shaped_rewards(old[:, None], reference.log()[:, None], rewards, torch.ones(3, 1), in_reward)[:, 0]
        advantages = each - (old.exp() * each).sum()
        for _ in range(2):
            logprobs = theta.log_softmax(0)
            loss, _ = clipped_surrogate(logprobs, old, advantages, 0.2)
            if kl_in == "loss":
                loss = loss + beta * 0.5 * (logprobs - reference.log()).square()
            optimizer.zero_grad()
            (old.exp() * loss).sum().backward()
            optimizer.step()
    assert 0.5 * (theta.softmax(0) - tilt).abs().sum() < 0.02
