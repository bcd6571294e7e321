"""What is wrong with a reference, a critic, their place or what is below the model, told before any weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, ModelError
from posttrain.models.lineage import is_reward_model, lineage, nonlinear, resolve_path
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.others import other_model, told_of
from posttrain.models.rope import position_limit

if TYPE_CHECKING:
    from posttrain.config import Config


def check_companions(cfg: Config, tokenizer: Any, trains: bool = True) -> None:
    """tokenizer: the policy's, whose ids they must read. trains: the model is not just looked at."""
    if trains and cfg.adapter.name == "none":
        check_trainable(cfg.model.path, "model.path")
    check_reference(cfg, tokenizer)
    check_critic(cfg, tokenizer)
    check_frozen_device(cfg)


def check_trainable(path: str | None, key: str) -> None:
    """That what is below an adapter can train as a whole and be saved as one."""
    kept = nonlinear(path)
    if not kept:
        return
    way_out = "give another model"
    if key == "model.path":
        below = lineage(kept[-1])[1][:-1]
        base = below[-1] if below else lineage(kept[-1])[0]
        way_out = (
            f"go on training that adapter (model.path={base} adapter=bottleneck adapter.path={kept[-1]}) or one on top of it "
            "(adapter=lora or bottleneck)"
        )
    raise ModelError(
        f"{key}={path} rests on the bottleneck adapter {kept[-1]}, which no weights can take in: as a whole it cannot be "
        f"trained and saved; {way_out}"
    )


def check_reference(cfg: Config, tokenizer: Any) -> None:
    """model.reference: that the stage has one, and that it is a policy of this vocabulary."""
    given = cfg.model.reference
    if given is None:
        return
    if cfg.stage.needs_reference(False) == "never" and not cfg.stage.keeps_reference:
        raise ConfigError(f"model.reference is given, but stage={cfg.stage_name} has no reference; leave it out")
    model = other_model(cfg.model, given)
    with told_of("model.reference"):
        load_config(model)
        if is_reward_model(resolve_path(given)):
            raise ModelError(f"model.path={given} is a reward model: it scores answers and writes none; give a policy")
        check_vocabulary(tokenizer, load_tokenizer(model), given, "model.reference")
        if getattr(cfg.stage, "kl_estimator", None) == "full":
            ours, theirs = (load_config(m).get_text_config(decoder=True).vocab_size for m in (cfg.model, model))
            if ours != theirs:
                raise ModelError(
                    f"model.reference={given} has {theirs:,} outputs and the policy {ours:,}, so stage.kl_estimator=full cannot "
                    "compare them; take stage.kl_estimator=k2"
                )


def check_critic(cfg: Config, tokenizer: Any) -> None:
    """model.critic: that the stage has one, that examples fit its positions, and that it reads the policy's token ids."""
    given = cfg.model.critic
    if given is None:
        return
    if not cfg.stage.needs_critic:
        raise ConfigError(
            f"model.critic is given, but stage={cfg.stage_name} has no critic as it is set; leave it out, or take stage=ppo "
            "stage.advantage=gae"
        )
    check_trainable(given, "model.critic")
    model = other_model(cfg.model, given)
    with told_of("model.critic"):
        limit = position_limit(load_config(model))
        if limit and cfg.data.max_length > limit:
            raise ConfigError(
                f"data.max_length={cfg.data.max_length}, but the positions of model.critic={given} end at {limit}"
            )
        check_vocabulary(tokenizer, load_tokenizer(model), given, "model.critic")


def check_frozen_device(cfg: Config) -> None:
    """model.frozen_device: that there is something to keep elsewhere, and that the place serves it."""
    where, stage = cfg.model.frozen_device, cfg.stage
    if where == "device":
        return
    own_weights = stage.keeps_reference and not is_policy_itself(cfg)
    if not own_weights and cfg.model.reward is None:
        why = (
            "the reference is the policy without its adapter"
            if stage.keeps_reference
            else "nothing stays beside the policy"
        )
        raise ConfigError(f"model.frozen_device={where}, but {why}, so there is nothing to move; leave it out")
    if own_weights and cfg.distribution.name == "fsdp":
        raise ConfigError(
            f"model.frozen_device={where} with distribution=fsdp: the reference lies in parts on the ranks as the policy does; "
            "leave it device, and set distribution.cpu_offload=true for host memory"
        )
    if own_weights and getattr(stage, "kl_estimator", None) == "full":
        raise ConfigError(
            f"model.frozen_device={where}, but stage.kl_estimator=full reads the reference in every step; take "
            "stage.kl_estimator=k2, or leave model.frozen_device=device"
        )


def is_policy_itself(cfg: Config) -> bool:
    """Whether the reference has no weights of its own: the policy without its fresh adapter, which adds nothing (B = 0)."""
    return cfg.model.reference is None and cfg.adapter.name != "none" and cfg.adapter.path is None


def check_vocabulary(own: Any, other: Any, path: str, key: str) -> None:
    """The model at that key must read the policy's token ids as the policy does."""
    ours, theirs = own.get_vocab(), other.get_vocab()
    if ours != theirs:
        differ = len(set(ours.items()) ^ set(theirs.items()))
        raise ModelError(
            f"{key}={path} has another vocabulary than the policy ({len(theirs):,} tokens there, {len(ours):,} here, "
            f"{differ:,} differ); its numbers would be of other text. Give one with the same tokenizer"
        )
