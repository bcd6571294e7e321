"""What one iteration of ppo has lived through: sampled responses with their rewards, log-probs and values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain import stats
from posttrain.data.tokens import TokenGroup
from posttrain.generation import Generation
from posttrain.rollout import Request
from posttrain.sampling import Sampling
from posttrain.stages.recomputed import token_columns
from posttrain.stages.responses import answered, laid_out

if TYPE_CHECKING:
    from posttrain.models.networks import Networks
    from posttrain.stages.base import Supply

SHOWN_PROMPTS = 4
"""Whose answers an iteration shows."""


@dataclass
class Experience:
    """All ranks' responses, one TokenGroup each, those of a prompt beside each other.

    mask, logprobs, reference, values: [B, T] over responses and their tokens, fp64, 0 off the mask; scores: [B] the rewards'
    weighted sum, NaN where one failed. parts: each reward's own [B]. finished: [B] whether an end token closed the response.
    texts: the responses as they were rewarded. referred: there is a reference; else its log-probs are the policy's own.
    """

    groups: list[TokenGroup]
    mask: Tensor
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    finished: Tensor
    samples: int
    texts: list[str]
    referred: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Nats a response by which the policy has left the reference, estimated on its own samples."""
        return float((self.logprobs - self.reference).sum(1).mean())

    def put(self, name: str, values: Tensor) -> None:
        """Give each response its tokens' values [B, T]; log-probs, reference and values go along."""
        for row, group in enumerate(self.groups):
            group.tokens[name] = values[row, : group.trained_tokens].numpy()

    def minibatch(self, positions: Sequence[int] | np.ndarray, layout: str) -> list[TokenGroup]:
        """The responses at these positions as Groups to train on; in the shared layout those of a prompt are one Group."""
        return laid_out(self.groups, positions, self.samples, layout)

    def token_minibatch(self, steps: np.ndarray, layout: str) -> list[TokenGroup]:
        """Likewise of these token-steps alone, counted through all responses; the others are read and not trained."""
        stops = np.cumsum([group.trained_tokens for group in self.groups])
        chosen = np.zeros(stops[-1], dtype=bool)
        chosen[steps] = True
        parts = np.split(chosen, stops[:-1])
        groups = {i: self.groups[i].only(part) for i, part in enumerate(parts) if part.any()}
        return laid_out(groups, list(groups), self.samples, layout)

    def rollouts(self, iteration: int) -> list[dict[str, Any]]:
        """A few prompts, each with its answers and their rewards, as JSON."""
        found = []
        for start in range(0, min(len(self.groups), SHOWN_PROMPTS * self.samples), self.samples):
            answers = []
            for i in range(start, start + self.samples):
                answers.append({
                    "answer": self.texts[i], "finished": bool(self.finished[i]), "reward": _known(self.scores[i]),
                    "rewards": {name: _known(part[i]) for name, part in self.parts.items()},
                    "kl": float((self.logprobs[i] - self.reference[i]).sum()) if self.referred else None,
                })  # fmt: skip
            group = self.groups[start]
            found.append({"id": group.cluster, "prompt": group.question, "iteration": iteration, "rollouts": answers})
        return found

    def metrics(self, beta: float, level: float = 0.95) -> dict[str, Any]:
        """For the log line of the iteration; rewards with intervals clustered by prompt."""
        clusters = [group.cluster for group in self.groups]
        lengths = self.mask.sum(1)
        real = self.mask.bool()
        found: dict[str, Any] = {"reward": _mean(self.scores, clusters, level)}
        found |= {
            f"reward/{name}": _mean(part, clusters, level) for name, part in self.parts.items() if len(self.parts) > 1
        }
        advantages = torch.cat([torch.from_numpy(g.tokens["advantages"]) for g in self.groups])
        found |= {
            **({"kl": self.kl, "beta": beta} if self.referred else {}),
            "entropy": float(self.entropy[real].mean()),
            "response_tokens": float(lengths.mean()),
            "truncated": float((~self.finished).double().mean()),
            "advantage_mean": float(advantages.mean()),
            "advantage_std": float(advantages.std(unbiased=False)),
            **self.counts,
        }
        if "returns" in self.groups[0].tokens:
            returns = torch.cat([torch.from_numpy(g.tokens["returns"]) for g in self.groups])
            error = returns - self.values[real]
            found["explained_variance"] = float(
                1 - error.var(unbiased=False) / returns.var(unbiased=False).clamp(min=1e-12)
            )
        found |= {f"{name}_seconds": value for name, value in self.seconds.items()}
        for part in ("rollout", "score"):
            found[f"{part}_tokens_per_second"] = float(lengths.sum()) / max(self.seconds[part], 1e-9)
        return found


def collect(
    networks: Networks, supply: Supply, stage: Any, prompts: list[TokenGroup], sampling: Sampling
) -> Experience:
    """Sample, score, and recompute log-probs with the training forward; every rank ends with all of it."""
    runtime, began = supply.runtime, time.monotonic()
    mine = list(range(len(prompts)))[runtime.rank :: runtime.world]
    assert supply.rollout is not None
    supply.rollout.update(networks)
    asked = Request([prompts[i].prompt for i in mine], mine, sampling, stage.samples, stage.max_new_tokens)
    answers = supply.rollout(networks, asked)
    rolled = time.monotonic()
    judged = supply.judge([prompts[i] for i in mine for _ in range(stage.samples)], answers)
    everything = runtime.gather([(mine, answers, judged)])
    groups, answers, texts, parts, unreadable = _in_order(prompts, everything, stage.samples)
    scored = time.monotonic()
    columns = token_columns(networks, supply, stage, groups)
    seconds = {"rollout": rolled - began, "reward": scored - rolled, "score": time.monotonic() - scored}
    weights = stage.reward_weights or [1.0] * len(parts)
    total = sum(w * part for w, part in zip(weights, parts.values(), strict=True))
    finished = torch.tensor([answer.finished for answer in answers])
    scores = torch.as_tensor(total, dtype=torch.float64)
    mask = _matrix([np.ones(group.trained_tokens) for group in groups])
    found = {name: _matrix(columns[name]) for name in ("logprobs", "reference", "values", "entropy")}
    experience = Experience(
        groups, mask, found["logprobs"], found["reference"], found["values"], found["entropy"], scores, parts, finished,
        stage.samples, texts, networks.frozen is not None, seconds,
    )  # fmt: skip
    experience.counts = {
        "reward_unreadable": unreadable / len(groups),
        "reward_failed": float(scores.isnan().double().mean()),
        "rollout_gap": float(np.abs(np.concatenate(columns["sampled"]) - _written(answers)).mean()),
    }
    for name, column in {"old": "sampled", "reference": "reference", "values": "values"}.items():
        for group, values in zip(groups, columns[column], strict=True):
            group.tokens[name] = values
    return experience


def imagined(prompts: list[TokenGroup], stage: Any) -> Experience:
    """What `collect` would give if every answer were as long as it may be: for a plan, which samples nothing."""
    tokens = stage.max_new_tokens
    ids, left = prompts[0].prompt[:1] * tokens, [np.zeros(1, dtype=np.int64)] * tokens
    kept = left if stage.top_k is not None or stage.top_p < 1 else None
    written = Generation(ids, None, [0.0] * tokens, kept)
    groups = [answered(prompt, written, k, "") for prompt in prompts for k in range(stage.samples)]
    for group in groups:
        group.tokens.update({name: np.zeros(tokens, dtype=np.float32) for name in ("old", "reference", "values")})
    mask = torch.ones(len(groups), tokens, dtype=torch.float64)
    zeros, scores = torch.zeros_like(mask), torch.arange(len(groups), dtype=torch.float64) % 2
    return Experience(
        groups, mask, zeros, zeros, zeros, zeros, scores, {}, scores > 0, stage.samples, [""] * len(groups)
    )


def _written(answers: Sequence[Generation]) -> np.ndarray:
    """The log-probs that the answers were drawn with, token after token."""
    return np.concatenate([np.array(answer.logprobs) for answer in answers])


def _in_order(prompts: list[TokenGroup], everything: list[Any], samples: int) -> Any:
    """What the ranks have sampled and scored, in the order of the prompts."""
    by_prompt: dict[int, tuple[list[Generation], list[str], dict[str, list[float]]]] = {}
    unreadable, names = 0, list[str]()
    for mine, answers, judged in everything:
        unreadable += judged.unreadable
        names = list(judged.scores) or names
        for place, i in enumerate(mine):
            part = slice(place * samples, (place + 1) * samples)
            scores = {name: values[part] for name, values in judged.scores.items()}
            by_prompt[i] = (answers[part], judged.texts[part], scores)
    order = range(len(prompts))
    answers = [answer for i in order for answer in by_prompt[i][0]]
    texts = [text for i in order for text in by_prompt[i][1]]
    groups = [
        answered(prompts[i], a, k, t) for i in order for k, (a, t) in enumerate(zip(*by_prompt[i][:2], strict=True))
    ]
    parts = {n: torch.tensor([v for i in order for v in by_prompt[i][2][n]], dtype=torch.float64) for n in names}
    return groups, answers, texts, parts, unreadable


def _mean(scores: Tensor, clusters: Sequence[str], level: float) -> Any:
    known = ~scores.isnan()
    values = scores[known].numpy()
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0}
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    rows = np.array([names[c] for c, k in zip(clusters, known.tolist(), strict=True) if k])
    sums, counts = (np.bincount(rows, w, minlength=len(names)) for w in (values, np.ones(len(values))))
    return stats.bootstrap(sums[counts > 0], counts[counts > 0], level=level, resamples=1_000)


def _known(score: Tensor) -> float | None:
    return None if score.isnan() else float(score)


def _matrix(rows: Sequence[np.ndarray]) -> Tensor:
    """[B, T] fp64, zeros behind each row."""
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.float64))
    return found
