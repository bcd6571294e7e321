"""Generation: token ids in, token ids out, in evaluation mode, with every sampling setting our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from posttrain.models.policy import Policy
from posttrain.models.rope import position_limit


@dataclass(frozen=True)
class Generation:
    """One answer: its ids without the end token, and whether an end token closed it (else the length limit did)."""

    ids: list[int]
    finished: bool


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[list[int]],
    ends: set[int],
    pad: int,
    max_new_tokens: int,
    batch_tokens: int = 16_384,
    device: torch.device | None = None,
) -> list[Generation]:
    """Greedy answers to tokenised prompts, in their order; prompts of like length share a batch, padded on the left.

    The model's own generation_config is overridden whole: a stray top_k or repetition_penalty there changes nothing.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
    )
    answers: list[Generation | None] = [None] * len(prompts)
    limit = position_limit(policy.network.config)  # an answer ends where the positions do
    with _only_settings(policy, settings):
        for part in _buckets(prompts, max_new_tokens, batch_tokens):
            ids, mask = _left_padded([prompts[i] for i in part], pad)
            settings.max_new_tokens = max(1, min(max_new_tokens, limit - ids.shape[1])) if limit else max_new_tokens
            output = policy.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
            for i, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((n for n, token in enumerate(row) if token in ends), None)
                answers[i] = Generation(row[:stop], stop is not None)
    return [answer for answer in answers if answer is not None]


@contextmanager
def _only_settings(policy: Policy, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and these settings as the model's own: what they leave unset is otherwise filled from its file."""
    was_training, own = policy.training, policy.network.generation_config
    policy.eval()
    policy.network.generation_config = settings
    try:
        yield
    finally:
        policy.network.generation_config = own
        policy.train(was_training)


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, [R, width]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _buckets(prompts: Sequence[list[int]], room: int, budget: int) -> Iterator[list[int]]:
    """Positions in batches of like length whose padded tokens, answers included, stay within the budget."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        rows = max(1, budget // (len(prompts[order[0]]) + room))
        yield order[:rows]
        order = order[rows:]
