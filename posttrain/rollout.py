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

import torch
from transformers import DynamicCache

from posttrain.generation import Generation, KVCacheGenerator
from posttrain.library_generation import LibraryGenerator
from posttrain.models.policy import Policy
from posttrain.models.rope import position_limit
from posttrain.models.sharding import gathered
from posttrain.sampling import Sampling, uniforms

if TYPE_CHECKING:
    from posttrain.models.networks import Networks

BATCH_TOKENS = 16_384
"""Most tokens, prompts, padding and room for the answers included, that are written to at a time."""


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
        write = (KVCacheGenerator if ours else LibraryGenerator)(policy, ends, pad, sampling, device)
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


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


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
