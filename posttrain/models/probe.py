"""Checks that the run's own forward is the model's: on two or three real examples, before the first step.

The library's masks differ by family and version, and families differ in what they do to their logits; so what a run relies
on is compared, not trusted: our log-probs against the model's own logits, an example in a padded batch against the example
alone, and the packed row against its examples alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.data.batches import Batch, collate
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder, text_config
from posttrain.models.reward import RewardModel

TOLERANCE = 1e-4
HALF_TOLERANCE = 0.1
"""Nats. The probe runs without autocast: the largest difference of any token; where weights are held in 16 or 4 bits, a
single token's rounding can reach half a nat, and the mean over tokens is held to the second."""

LEAK_TOLERANCE = 1e-5
HALF_LEAK_TOLERANCE = 1e-2
"""Relative change of an example's hidden states when its neighbours' tokens change: all but zero, whatever the weights. Fresh
weights mix little between positions, so that log-probs alone would pass what training makes a leak of."""

NO_TRAINING = "posttrain cannot train this architecture"


@torch.no_grad()
def check_forward(policy: Decoder, groups: list[TokenGroup], layout: str, device: torch.device) -> dict[str, float]:
    """Differences in nats found; ModelError above the tolerance. groups: two or more real examples."""
    policy.eval()
    matmul, tf32 = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = False  # the comparison is of the arithmetic, not of its rounding
    try:
        with policy.without_float8():  # likewise; weights that lie in parts are read under autocast, which turns it on
            return _check(policy, groups, layout, device)
    finally:
        matmul.allow_tf32 = tf32


def _check(policy: Decoder, groups: list[TokenGroup], layout: str, device: torch.device) -> dict[str, float]:
    kind = policy.network.config.model_type
    exact = policy.computes_in == torch.float32
    tolerance, leak_tolerance = (TOLERANCE, LEAK_TOLERANCE) if exact else (HALF_TOLERANCE, HALF_LEAK_TOLERANCE)
    alone = _alone(policy, groups, device)
    padded = _batch(groups, "padded", device)
    found = {"output_layer": _output_layer(policy, groups[:2], device, exact)}
    if not found["output_layer"] <= tolerance:
        raise ModelError(
            f"{kind}: numbers from our output layer differ from the model's own by {found['output_layer']:.2g}; this "
            "architecture does something to its logits that posttrain does not know"
        )
    found["padded"] = _difference(_numbers(policy, padded), alone, exact)
    looks = _leak(policy, padded, padded.segments < 0) if bool((padded.segments < 0).any()) else 0.0
    if not found["padded"] <= tolerance or not looks <= leak_tolerance:
        raise ModelError(
            f"{kind}: an example's log-probs depend on the padding and the examples beside it (by {found['padded']:.2g} "
            f"nats, its hidden states by {looks:.2g} of their size); {NO_TRAINING}"
        )
    if layout != "padded":
        found[layout], leak = _together(policy, groups, layout, alone, device, exact)
        if not found[layout] <= tolerance or not leak <= leak_tolerance:
            raise ModelError(
                f"batch.layout={layout}: {kind} lets examples that share a row see each other, or less than alone (numbers "
                f"differ by {found[layout]:.2g}, hidden states by {leak:.2g} of their size); use batch.layout=padded"
            )
    return found


def _batch(groups: list[TokenGroup], layout: str, device: torch.device) -> Batch:
    whole = list(range(len(groups)))
    return collate(groups, [whole] if layout == "packed" else [[i] for i in whole], layout).to(device)


def _numbers(policy: Decoder, batch: Batch) -> Tensor:
    """What the run reads off a forward pass: [N] log-probs of a policy, [responses, H] pooled states of a reward model."""
    if isinstance(policy, RewardModel):  # its score layer may be zero still: the states that it will score
        states = policy.pooled(batch).float()
        return states / states.square().mean(-1, keepdim=True).sqrt()
    found: Tensor = policy(batch).logprobs
    return found


def _alone(policy: Decoder, groups: list[TokenGroup], device: torch.device) -> Tensor:
    """The numbers with nothing beside a response: no padding, no other row. [N] or [responses]"""
    ones = [collate([one], [[0]], "padded") for group in groups for one in group.each()]
    return torch.cat([_numbers(policy, one.to(device)) for one in ones])


def _output_layer(policy: Decoder, groups: list[TokenGroup], device: torch.device, exact: bool) -> float:
    """Against the model's own (R, L, V) logits, or its own scores; for a handful of short rows only."""
    if isinstance(policy, RewardModel):
        if policy.pooling != "last":
            return 0.0  # the library has no such score to compare with
        return _scores(policy, groups, device, exact)
    batch = _batch(groups, "padded", device)
    logits = policy.own_logits(batch.input_ids).flatten(0, 1)[batch.predict].float()
    own = logits.log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    return _difference(_numbers(policy, batch), own, exact)


def _scores(policy: RewardModel, groups: list[TokenGroup], device: torch.device, exact: bool) -> float:
    """Our scores against the library's, which pools the last token of a row on its own if it knows no padding."""
    config = policy.network.config.get_text_config()
    pad, config.pad_token_id = config.pad_token_id, None
    ones = [one for group in groups for one in group.each()]
    try:
        half = torch.bfloat16 if exact else policy.computes_in
        with torch.autocast(device.type, half, enabled=not exact):  # its score layer may be wider than its states
            rows = [torch.tensor([one.prompt + one.responses[0]], device=device) for one in ones]
            own = torch.cat([policy.own_logits(row) for row in rows]).squeeze(-1).float()
    finally:
        config.pad_token_id = pad
    ours = torch.cat([policy(collate([one], [[0]], "padded").to(device)).rewards for one in ones])
    return _difference(ours, own, exact)


def _together(
    policy: Decoder, groups: list[TokenGroup], layout: str, alone: Tensor, device: torch.device, exact: bool
) -> tuple[float, float]:
    batch = _batch(groups, layout, device)
    first = batch.segments == 0
    if batch.is_prompt is not None:
        first &= ~batch.is_prompt  # its prompt is the other responses' too
    try:
        return _difference(_numbers(policy, batch), alone, exact), _leak(policy, batch, first)
    except ModelError as error:
        raise ModelError(f"batch.layout={layout}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        kind = policy.network.config.model_type
        raise ModelError(
            f"batch.layout={layout} does not work with {kind}: {error}; use batch.layout=padded"
        ) from error


def _leak(policy: Decoder, batch: Batch, changed: Tensor) -> float:
    """How far other tokens in the `changed` positions [R, L] move the hidden states of the rest, relative to their size."""
    network: Any = policy.network
    rows = network.get_input_embeddings().weight.shape[0]
    other = replace(batch, input_ids=torch.where(changed, (batch.input_ids + 1) % rows, batch.input_ids))
    rest = (batch.segments >= 0) & ~changed
    before, after = (policy.read(b)[rest].float() for b in (batch, other))
    return float((after - before).norm() / before.norm())


def _difference(a: Tensor, b: Tensor, exact: bool) -> float:
    gaps = (a - b).abs()
    return float(gaps.max() if exact else gaps.mean())


def sliding_window(network: Any) -> int | None:
    """The shortest span of positions that some layer attends to, where the config limits it."""
    config = text_config(network)
    names = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")
    found = [getattr(config, name, None) for name in names]
    if getattr(config, "use_sliding_window", True) is False:
        found[0] = None
    return min((int(span) for span in found if isinstance(span, int) and span > 0), default=None)


def probe_positions(
    longest: Sequence[int] | np.ndarray, window: int | None = None, max_tokens: int = 4096
) -> list[int]:
    """Which examples to probe with, by their lengths: the two shortest, and the shortest that reaches past the sliding
    window; where there is no window, or none does, the longest within max_tokens."""
    lengths = np.asarray(longest)
    order = np.argsort(lengths, kind="stable")
    chosen = [int(order[0]), int(order[min(1, len(order) - 1)])]
    past = [int(i) for i in order if window is not None and lengths[i] > window]
    within = [int(i) for i in order if lengths[i] <= max_tokens]
    return [*chosen, *(past[:1] or within[-1:])]
