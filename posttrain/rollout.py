"""Generation: token ids in; ids, finish reason and log-probs out, in evaluation mode, with every sampling setting our own.

Prompts of like length share a batch, padded on the left; rows that have finished leave it; a prompt that is answered several
times is read once. Every answer draws its random numbers from a stream of its own, so that neither the batch it is made in
nor the number of ranks decides what is sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from posttrain.models.policy import Policy
from posttrain.models.rope import position_limit
from posttrain.models.sharding import gathered
from posttrain.sampling import Sampling, kept_ids, pick, uniforms

if TYPE_CHECKING:
    from posttrain.models.networks import Networks

BATCH_TOKENS = 16_384
"""Most tokens, prompts, padding and room for the answers included, that are written to at a time."""

LEAVE = 0.75
"""Rows leave the batch once at most this share of it is still being written: each time copies the others' cache."""


@dataclass(frozen=True)
class Generation:
    """One answer: its ids without the end token; the end token that closed it, or None where the length limit did.

    logprobs: nats of the ids and the end token under the distribution they were drawn from. kept: for each of them the
    tokens that top_k and top_p left to draw from, where they were set.
    """

    ids: list[int]
    end: int | None
    logprobs: list[float]
    kept: list[np.ndarray] | None = None

    @property
    def finished(self) -> bool:
        return self.end is not None


@dataclass(frozen=True)
class Request:
    """What a stage asks for: `samples` answers to each tokenised prompt; keys as in `generate`."""

    prompts: Sequence[list[int]]
    keys: Sequence[int]
    sampling: Sampling
    samples: int
    max_new_tokens: int


class RolloutBackend(Protocol):
    """Who writes a stage's answers: token ids in; ids, finish reason and log-probs out."""

    def update(self, networks: Networks) -> None:
        """Take on the policy's weights as they are now."""

    def __call__(self, networks: Networks, request: Request) -> list[Generation]:
        """The answers, those to a prompt beside each other."""


@dataclass(frozen=True)
class InProcess:
    """The networks themselves write, on the device where they train."""

    ends: set[int]
    pad: int
    runtime: Any

    def update(self, networks: Networks) -> None:
        pass

    def __call__(self, networks: Networks, request: Request) -> list[Generation]:
        with self.runtime.autocast():
            return generate(
                networks.module, request.prompts, self.ends, self.pad, request.max_new_tokens, device=self.runtime.device,
                sampling=request.sampling, samples=request.samples, keys=request.keys,
            )  # fmt: skip


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[list[int]],
    ends: set[int],
    pad: int,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    device: torch.device | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    keys: Sequence[int] | None = None,
) -> list[Generation]:
    """Answers to tokenised prompts, in their order, `samples` of them beside each other for each prompt.

    keys: a number a prompt (default: its place), which with sampling.seed decides its random numbers.
    """
    sampling, keys = sampling or Sampling(), range(len(prompts)) if keys is None else keys
    answers: list[list[Generation]] = [[] for _ in prompts]
    limit = position_limit(policy.network.config)  # an answer ends where the positions do
    with gathered(policy), _evaluating(policy):
        ours = attends(policy, device)
        write = (_Writer if ours else _Library)(policy, ends, pad, sampling, device)
        for part in buckets(prompts, max_new_tokens, batch_tokens, samples, padded=ours):
            given = [prompts[i] for i in part]
            room = max(1, min(max_new_tokens, limit - max(map(len, given)))) if limit else max_new_tokens
            found = write(given, uniforms([keys[i] for i in part], samples, room, sampling), samples, room)
            for place, i in enumerate(part):
                answers[i] = found[place * samples : (place + 1) * samples]
    return [answer for each in answers for answer in each]


def attends(policy: Policy, device: Any = None) -> bool:
    """Whether all that the model keeps of earlier tokens is attention's cache, which passes padding over and whose rows can be
    chosen; recurrent models are written by the library's loop, without padding."""
    network: Any = policy.network
    if "past_key_values" not in inspect.signature(network.forward).parameters:
        return False
    output = network(input_ids=torch.tensor([[0]], device=device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    return type(cache) is DynamicCache and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


class _Writer:
    """Our own loop over attention's cache."""

    def __init__(self, policy: Policy, ends: set[int], pad: int, sampling: Sampling, device: Any) -> None:
        self.network, self.pad, self.sampling, self.device = policy.network, pad, sampling, device
        self.ends = torch.tensor(sorted(ends), device=device)
        known = inspect.signature(self.network.forward).parameters
        self.positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, prompts: Sequence[list[int]], uniforms: Tensor, samples: int, room: int) -> list[Generation]:
        ids, mask = (t.to(self.device) for t in _left_padded(prompts, self.pad))
        rows = len(prompts) * samples
        logits, cache = self._forward(ids, mask, mask.cumsum(-1).sub(1).clamp(min=0), None)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = (t.repeat_interleave(samples, 0) for t in (logits, mask))
        uniforms = uniforms.to(self.device)
        tokens = torch.full((rows, room), self.pad, device=self.device)
        logprobs = torch.zeros(rows, room, device=self.device)
        kept: list[list[np.ndarray]] | None = [[] for _ in range(rows)] if self.sampling.filters else None
        lengths = torch.full((rows,), room, device=self.device)
        here = torch.arange(rows, device=self.device)  # the answers that the batch's rows are
        alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        for t in range(room):
            token, distribution, logprob = pick(logits, self.sampling, uniforms[here, t])
            written = here[alive]
            if kept is not None:
                for row, ids_left in zip(written.tolist(), kept_ids(distribution[alive]), strict=True):
                    kept[row].append(ids_left)
            tokens[written, t], logprobs[written, t] = token[alive], logprob[alive]
            ended = alive & torch.isin(token, self.ends)
            lengths[here[ended]] = t + 1
            alive = alive & ~ended
            left = int(alive.sum())
            if not left or t + 1 == room:
                break
            if left <= LEAVE * len(alive):
                still = alive.nonzero()[:, 0]
                cache.batch_select_indices(still)
                here, mask, token, alive = here[still], mask[still], token[still], alive[still]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits, cache = self._forward(token[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
        return self._answers(tokens, logprobs, lengths, kept)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The last position's logits, [rows, V], and the cache."""
        where = {"position_ids": positions} if self.positions else {}
        output = self.network(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **self.last_only
        )
        return output.logits[:, -1], output.past_key_values

    def _answers(
        self, tokens: Tensor, logprobs: Tensor, lengths: Tensor, kept: list[list[np.ndarray]] | None
    ) -> list[Generation]:
        ends = set(self.ends.tolist())
        found = []
        for row, (ids, nats, length) in enumerate(
            zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        ):
            ids = ids[:length]
            end = ids[-1] if ids[-1] in ends else None
            left = None if kept is None else kept[row]
            found.append(Generation(ids if end is None else ids[:-1], end, nats[:length], left))
        return found


class _Library:
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
            t.to(self.device).repeat_interleave(samples, 0) for t in _left_padded(prompts, self.settings.pad_token_id)
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
def _evaluating(policy: Policy) -> Iterator[None]:
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


@contextmanager
def _only_settings(policy: Policy, settings: GenerationConfig) -> Iterator[None]:
    """These settings as the model's own: what they leave unset is otherwise filled from its file."""
    own = policy.network.generation_config
    policy.network.generation_config = settings
    try:
        yield
    finally:
        policy.network.generation_config = own


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask, [R, width]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def buckets(
    prompts: Sequence[list[int]], room: int, budget: int, samples: int, padded: bool = True
) -> Iterator[list[int]]:
    """Positions in batches of like length, of equal length unless `padded`, whose tokens, answers and padding included, stay
    within the budget."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        longest = len(prompts[order[0]])
        rows = max(1, budget // ((longest + room) * samples))
        if not padded:
            rows = min(rows, sum(len(prompts[i]) == longest for i in order))
        yield order[:rows]
        order = order[rows:]
