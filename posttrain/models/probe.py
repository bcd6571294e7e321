"""Checks that the run's own forward is the model's: on two real examples, before the first step.

The library's masks differ by family and version, and families differ in what they do to their logits; so what a run relies
on is compared, not trusted: our log-probs against the model's own logits, and the packed row against its examples alone.
"""

from __future__ import annotations

import torch

from posttrain.data.batches import Batch, collate
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError
from posttrain.models.policy import Policy

TOLERANCE = 1e-4
HALF_TOLERANCE = 0.1
"""Nats. The probe runs without autocast; weights held in 16 or 4 bits round more."""


@torch.no_grad()
def check_forward(policy: Policy, groups: list[TokenGroup], layout: str, device: torch.device) -> dict[str, float]:
    """Largest differences in nats found; ModelError above the tolerance. groups: two or more real examples."""
    policy.eval()
    padded = collate(groups, [[i] for i in range(len(groups))], "padded").to(device)
    ours = policy(padded, statistics=True).logprobs
    short = collate(groups[:2], [[0], [1]], "padded").to(device)
    own = _own_logprobs(policy, short)
    found = {"output_layer": float((policy(short, statistics=True).logprobs - own).abs().max())}
    tolerance = TOLERANCE if next(policy.backbone.parameters()).dtype == torch.float32 else HALF_TOLERANCE
    kind = policy.network.config.model_type
    if not found["output_layer"] <= tolerance:
        raise ModelError(
            f"{kind}: log-probs from the chunked output layer differ from the model's own logits by "
            f"{found['output_layer']:.2g} nats; this architecture does something to its logits that posttrain does not know"
        )
    if layout == "packed":
        found["packed"] = _packed_difference(policy, groups, ours, device, kind)
        if not found["packed"] <= tolerance:
            raise ModelError(
                f"batch.layout=packed: {kind} lets packed examples see each other (log-probs differ by "
                f"{found['packed']:.2g} nats); use batch.layout=padded"
            )
    return found


def _own_logprobs(policy: Policy, batch: Batch) -> torch.Tensor:
    """From the model's own (R, L, V) logits; for a handful of short rows only."""
    logits = policy.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.predict].float()
    return logits.log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)


def _packed_difference(
    policy: Policy, groups: list[TokenGroup], alone: torch.Tensor, device: torch.device, kind: str
) -> float:
    packed = collate(groups, [list(range(len(groups)))], "packed").to(device)
    try:
        together = policy(packed, statistics=True).logprobs
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"batch.layout=packed does not work with {kind}: {error}; use batch.layout=padded") from error
    return float((together - alone).abs().max())


def probe_examples(groups: list[TokenGroup], max_tokens: int = 4096) -> list[TokenGroup]:
    """The two shortest of these and, where there is room, the longest: it reaches past a sliding window if any does."""
    ordered = sorted(groups, key=lambda g: max(g.lengths))
    chosen = ordered[:2] if len(ordered) > 1 else [ordered[0], ordered[0]]
    longest = ordered[-1]
    return [*chosen, longest] if max(longest.lengths) <= max_tokens else chosen
