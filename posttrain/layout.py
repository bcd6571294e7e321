"""Which layout a run takes, and whether its model can: decided from the data's lengths, checked on real examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.packing import Packing, row_cost
from posttrain.data.pipeline import Prepared
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError
from posttrain.models.load import load_config
from posttrain.models.others import told_of
from posttrain.models.policy import ValueModel
from posttrain.models.probe import check_forward, sliding_window
from posttrain.models.reward import POOLING_KEY, RewardModel
from posttrain.runtime import Runtime

if TYPE_CHECKING:
    from posttrain.config import Config

MICRO_TOKENS = {"cpu": 896, "cuda": 16_384}
"""Default token budget of one forward: enough to fill the device, small enough to fit beside the weights. A 135 M model's
activations take about 1 MiB a token."""

OVERHEAD_TOKENS = {"cpu": 256, "cuda": 1_024}
"""What one more forward costs beside its tokens: reading the weights, launching kernels."""

SHARED_GAIN = 0.95
"""batch.layout=auto shares prompts where that leaves at most this share of the padded layout's cost."""


def packing_of(cfg: Config, device: str, prepared: Prepared) -> Packing:
    """batch.* with what was left to `auto` decided: padded, for rows sorted by length waste little; packed where the
    attention kernel skips other documents; shared where repeating the prompts would cost more."""
    flash = str(cfg.model.attention).startswith("flash")
    layout = cfg.batch.layout if cfg.batch.layout != "auto" else ("packed" if flash else _cheapest(cfg, prepared))
    budget = cfg.batch.micro_tokens or MICRO_TOKENS[device]
    return Packing(layout, budget, cfg.batch.micro_size, one_row=flash, overhead_tokens=OVERHEAD_TOKENS[device])


def _cheapest(cfg: Config, prepared: Prepared) -> str:
    """padded, or shared where its rows cost less by more than the masks they need."""
    data = prepared.train if len(prepared.train) else prepared.eval
    sampled, tokens = (
        cfg.stage.answers,
        cfg.stage.answer_tokens,
    )  # of an answer that is yet to be written the most it may be
    if not len(data) or max(sampled, int(data.counts.max())) < 2:
        return "padded"
    size = int(load_config(cfg.model).get_text_config(decoder=True).hidden_size)
    shared = row_cost(data.widths("shared") + sampled * tokens, np.ones_like(data.counts), size)
    padded = row_cost(data.longest + tokens, data.counts + sampled, size)
    return "shared" if shared < SHARED_GAIN * padded else "padded"


def beyond_budget(prepared: Prepared, packing: Packing, max_length: int) -> list[str]:
    """A line for a plan where examples alone take more tokens than one forward should."""
    if packing.micro_size:
        return []
    budget, layout = f"batch.micro_tokens={packing.micro_tokens:,}", packing.layout
    alone = "a forward is then one row as long as that" if layout == "packed" else "each has a forward of its own"
    if prepared.stream:
        if max_length <= packing.micro_tokens:
            return []
        return [f"examples of more tokens than {budget} may come, for data.max_length={max_length:,}: {alone}"]
    sizes = np.concatenate([data.widths(layout) * data.heights(layout) for data in (prepared.train, prepared.eval)])
    beyond = sizes[sizes > packing.micro_tokens]
    if not len(beyond):
        return []
    return [f"{len(beyond):,} examples have more tokens than {budget} (the longest {int(beyond.max()):,}): {alone}"]


def probe_networks(
    cfg: Config, policy: Any, prepared: Prepared, probed: Sequence[int], packing: Packing, runtime: Runtime
) -> tuple[dict[str, float], Packing]:
    """Check the policy's forward pass, and that of a critic beside it, on these examples of the training data; the layout
    that both can do."""
    examples = [group if group.count else group.in_two() for group in prepared.train.groups(probed)]
    found, packing = probe_layout(cfg, policy, prepared, examples, packing, runtime)
    critic = getattr(policy, "critic", None)
    if isinstance(critic, ValueModel):
        with told_of("model.critic"):
            packing = probe_critic(cfg, critic, prepared, examples, packing, runtime)
    return found, packing


def probe_layout(
    cfg: Config, policy: Any, prepared: Prepared, groups: list[TokenGroup], packing: Packing, runtime: Runtime
) -> tuple[dict[str, float], Packing]:
    """Check the forward pass on these examples. A layout that was asked for and cannot be is an error; one that `auto` chose
    gives way to padded, and that is said."""
    try:
        _check_window(policy, prepared, packing.layout, cfg.data.max_length, cfg.stage.answer_tokens)
        return check_forward(policy, groups, packing.layout, runtime.device), packing
    except ModelError as error:
        if cfg.batch.layout != "auto" or packing.layout == "padded":
            raise
        padded = replace(packing, layout="padded")
        found = check_forward(policy, groups, "padded", runtime.device)
        prepared.lines.append(f"batch.layout=auto takes padded: {error}")
        return found, padded


def probe_critic(
    cfg: Config, critic: ValueModel, prepared: Prepared, groups: list[TokenGroup], packing: Packing, runtime: Runtime
) -> Packing:
    """A critic of its own reads the same batches: checked as a reward model is, which has the same forward pass."""
    config = critic.network.config
    known = hasattr(config, POOLING_KEY)
    reader = RewardModel(critic.network)
    if runtime.shards:  # its layers are gathered in the run's precision
        reader.gathered_in = runtime.compute_dtype
    try:
        with runtime.autocast() if runtime.shards else nullcontext():
            return probe_layout(cfg, reader, prepared, groups, packing, runtime)[1]
    finally:
        if not known:
            delattr(config, POOLING_KEY)


def _check_window(policy: Any, prepared: Prepared, layout: str, max_length: int, answer_tokens: int = 0) -> None:
    """A mask of our own takes the place of the library's sliding window, so rows must not reach past it."""
    window = sliding_window(policy.network)
    longest = max((int(data.longest.max()) for data in (prepared.train, prepared.eval) if len(data)), default=0)
    longest += answer_tokens
    longest, known = (max_length, "may have") if prepared.stream else (longest, "has")
    if layout == "shared" and window is not None and longest > window:
        raise ModelError(
            f"batch.layout=shared: {policy.network.config.model_type} attends to {window} positions, and the longest example "
            f"{known} {longest}; use batch.layout=padded, or a data.max_length of at most {window}"
        )
