"""The options of ppo: which of them cannot go together, and how a plan tells them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.stages.ppo import PPO


def refuse_options(stage: PPO) -> None:
    """ConfigError for options that cannot go together."""
    if not stage.rewards:
        raise ConfigError("stage.rewards is empty; try [number], [exact] or [my_module:my_function]")
    if stage.reward_weights is not None and len(stage.reward_weights) != len(stage.rewards):
        raise ConfigError(
            f"stage.reward_weights has {len(stage.reward_weights)} numbers for {len(stage.rewards)} stage.rewards; give "
            "each reward its weight"
        )
    if stage.advantage in ("group", "leave_one_out") and stage.samples < 2:
        raise ConfigError(
            f"stage.advantage={stage.advantage} compares a prompt's answers, and stage.samples={stage.samples}; try "
            "stage.samples=8, or stage.advantage=gae"
        )
    if stage.critic_warmup and not stage.needs_critic:
        raise ConfigError(
            f"stage.critic_warmup={stage.critic_warmup}, but stage.advantage={stage.advantage} has no critic; set it to 0, or "
            "take stage.advantage=gae"
        )
    if stage.kl_estimator == "full" and (stage.kl_in == "reward" or not stage.beta):
        raise ConfigError(
            f"stage.kl_estimator=full is of the KL in the loss, and stage.kl_in={stage.kl_in}, stage.beta={stage.beta:g}; "
            "try stage=ppo_kl stage.kl_estimator=full"
        )
    if stage.rollout_server is not None and (stage.top_k is not None or stage.top_p < 1):
        raise ConfigError(
            f"stage.top_k={stage.top_k}, stage.top_p={stage.top_p:g}: a server does not say which tokens it left out, without "
            "which the ratio of new to old is biased; leave both off, or leave stage.rollout_server null"
        )
    if stage.kl_target is not None and not stage.beta:
        raise ConfigError("stage.kl_target moves stage.beta, which is 0; try stage.beta=0.05")


def facts_of(stage: PPO) -> list[tuple[str, str]]:
    """What: value, for the plan's table."""
    answers = (
        f"{stage.samples} to each prompt, at most {stage.max_new_tokens} tokens, temperature {stage.temperature:g}"
        + (f", top_k {stage.top_k}" if stage.top_k is not None else "")
        + (f", top_p {stage.top_p:g}" if stage.top_p < 1 else "")
    )
    whitened = ", whitened" if stage.whiten and stage.advantage in ("gae", "return") else ""
    penalty = (
        "none" if not stage.beta else f"{stage.beta:g} in {'reward and loss' if stage.kl_in == 'both' else stage.kl_in}"
    )
    rescaled = "; whitening rescales it" if whitened and stage.beta and stage.kl_in != "reward" else ""
    return [
        ("answers", answers),
        (
            "rewards",
            f"{', '.join(stage.rewards)}; advantage {stage.advantage}{whitened}; KL penalty {penalty}{rescaled}",
        ),
        ("iteration", f"{stage.updates} steps: {stage.epochs} epochs of {stage.minibatches} minibatches"),
    ]
