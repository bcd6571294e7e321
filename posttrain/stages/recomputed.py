"""What the training forward gives for sampled responses: log-probs under policy and reference, entropies and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.data.loader import evaluation_batches, gather
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.models.sharding import is_sharded
from posttrain.stages.responses import by_prompt, joined

if TYPE_CHECKING:
    from posttrain.models.networks import Networks
    from posttrain.stages.base import Supply


def token_columns(
    networks: Networks, supply: Supply, stage: Any, groups: list[TokenGroup]
) -> dict[str, list[np.ndarray]]:
    """logprobs, entropy and values under the policy as it is, reference under the reference: of each response's tokens.
    sampled: logprobs among the tokens that could be drawn."""
    own = _forwards(networks.policy, supply, stage, groups)
    zeros = [np.zeros(group.trained_tokens, dtype=np.float32) for group in groups]
    columns = {"values": zeros, "reference": own["logprobs"]} | own
    if networks.frozen is not None:
        with networks.frozen() as policy:
            columns["reference"] = _forwards(policy, supply, stage, groups, bare=True)["logprobs"]
    return columns


@torch.no_grad()
def _forwards(
    policy: Any, supply: Supply, stage: Any, groups: list[TokenGroup], bare: bool = False
) -> dict[str, list[np.ndarray]]:
    """The work is shared by the ranks; in evaluation mode, so that no dropout stands between old and new. bare: log-probs
    alone."""
    runtime, shared = supply.runtime, supply.packing.layout == "shared"
    parts_of = by_prompt(range(len(groups)), stage.samples) if shared else [[i] for i in range(len(groups))]
    data = Examples([joined([groups[i] for i in part]) for part in parts_of] if shared else groups)
    was_training = policy.training
    device = runtime.device if is_sharded(policy) else next(policy.parameters()).device  # parts may wait in host memory
    policy.eval()
    found: dict[str, list[Any]] = {}
    parts = []
    for positions, rows in evaluation_batches(data, supply.packing, runtime.rank, runtime.world):
        batch = gather(data, positions, rows, supply.packing.layout).to(device)
        with runtime.autocast(device):
            scores = policy(batch, statistics=True, entropy=not bare, temperature=stage.temperature, bare=bare)
        columns = {"logprobs": scores.logprobs}
        if not bare:
            columns["entropy"] = scores.statistics.entropy
            columns["sampled"] = scores.logprobs if scores.sampled is None else scores.sampled
            columns |= {"values": scores.values} if scores.values is not None else {}
        used = [i for row in rows for place in row for i in parts_of[positions[place]]]
        parts.append((used, {name: column.float().cpu().numpy() for name, column in columns.items()}))
    policy.train(was_training)
    for used, columns in runtime.gather(parts):
        stops = np.cumsum([0, *(groups[i].trained_tokens for i in used)])
        for name, column in columns.items():
            into = found.setdefault(name, [None] * len(groups))
            for place, i in enumerate(used):
                into[i] = column[stops[place] : stops[place + 1]]
    return found
