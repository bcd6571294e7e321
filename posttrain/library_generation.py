"""Generation by the library's loop, for models that keep another state than attention's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from posttrain.generation import Generation, left_padded
from posttrain.models.policy import Policy
from posttrain.sampling import Sampling, kept_ids


class LibraryGenerator:
    """The library's generate, for models that keep another kind of state."""

    def __init__(self, policy: Policy, ends: set[int], pad: int, sampling: Sampling, device: Any) -> None:
        self.policy, self.ends, self.device, self.filters = policy, ends, device, sampling.filters
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
        self.settings = GenerationConfig(
            num_beams=1, eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True, return_dict_in_generate=True,
            output_scores=True, **({"do_sample": True, **drawn} if sampling.temperature else {"do_sample": False}),
        )  # fmt: skip

    def __call__(self, prompts: Sequence[list[int]], uniforms: Tensor, samples: int, room: int) -> list[Generation]:
        ids, mask = (
            t.to(self.device).repeat_interleave(samples, 0) for t in left_padded(prompts, self.settings.pad_token_id)
        )
        self.settings.max_new_tokens = room
        with _only_settings(self.policy, self.settings), torch.random.fork_rng():
            torch.manual_seed(int(uniforms[0, 0] * 2**53))
            output = self.policy.model.generate(input_ids=ids, attention_mask=mask)
        tokens = output.sequences[:, ids.shape[1] :]
        whole = torch.stack([score.float().log_softmax(-1) for score in output.scores], 1)  # [rows, room, V]
        nats = whole.gather(-1, tokens[..., None])[..., 0]
        found = []
        for i, (row, logprobs) in enumerate(zip(tokens.tolist(), nats.tolist(), strict=True)):
            stop = next((n for n, token in enumerate(row) if token in self.ends), None)
            end, length = (None, len(row)) if stop is None else (row[stop], stop + 1)
            kept = kept_ids(whole[i, :length]) if self.filters else None
            found.append(Generation(row[:stop], end, logprobs[:length], kept))
        return found


@contextmanager
def _only_settings(policy: Policy, settings: GenerationConfig) -> Iterator[None]:
    """These settings as the model's own: what they leave unset is otherwise filled from its file."""
    own = policy.network.generation_config
    policy.network.generation_config = settings
    try:
        yield
    finally:
        policy.network.generation_config = own
