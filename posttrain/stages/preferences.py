"""What the preference stages share: the pairs within Groups, link functions of a margin, and a margin's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.data.group import Group
from posttrain.data.join import join_prompts
from posttrain.data.preferences import oddities, standings
from posttrain.errors import DataError
from posttrain.stages.base import Asked, Records, Stage
from posttrain.stats import fine_bins, temperature_grid

if TYPE_CHECKING:
    from posttrain.data.batches import Batch


@dataclass
class Preference(Stage):
    """A stage that learns from K judged responses to a prompt. Targets are the responses' tokens, whole turns."""

    aux_weight: float = field(default=0.001, metadata={"min": 0.0})

    data_formats: ClassVar[tuple[str, ...]] = ("pairs", "groups", "scored")
    train_on: ClassVar[str] = "response"
    confidence_of: ClassVar[str] = "pairs"
    streams: ClassVar[bool] = False  # prompts are joined, and the reference reads all of the data first

    def keeps(self, group: Group) -> bool:
        """Whether this Group has anything to learn from."""
        raise NotImplementedError

    def select(self, group: Group, seed: int) -> Group:
        """The Group as it is trained on. seed: the run's."""
        return group

    def weights(self) -> dict[str, float]:
        return {"aux": self.aux_weight}

    def units(self, batch: Batch) -> dict[str, float]:
        """Units of the stage's own loss terms."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        return {**self.units(batch), "aux": float(batch.sequence_tokens)}

    def groups(self, groups: Iterable[Group], notes: Counter[str], seed: int = 0) -> Iterator[Group]:
        """Judged Groups with something to learn from; single responses to one prompt are joined."""
        seen = kept = 0
        for group in _joined(groups):
            if standings(group) is None:
                raise DataError(f"{group.file}, row {group.row}: no rewards, ranks or target_probs judge the responses")
            seen += 1
            notes.update(oddities([group]))
            if self.keeps(group):
                kept += 1
                yield self.select(group, seed)
        if seen > kept:
            notes[f"skipped: {self.useless}"] += seen - kept


def _joined(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups of several responses as they come; then the single ones, those of equal prompts as one Group."""
    singles = []
    for group in groups:
        if len(group.responses) == 1 and group.rewards is not None:
            singles.append(group)
        else:
            yield group
    yield from join_prompts(singles)


class Pairs(NamedTuple):
    """first stands above second, [P] indices of responses; p: [P] probability that the first is preferred, fp64."""

    first: Tensor
    second: Tensor
    p: Tensor


def pairs_in(batch: Batch) -> Pairs:
    """Every untied pair of responses of the same Group. A Group of two with target_probs is one pair with that preference,
    a tie (½) included."""
    group, stand = batch.group, batch.standings
    same = group[:, None] == group[None, :]  # [responses, responses]
    two = (torch.bincount(group)[group] == 2) & ~batch.target_probs.isnan()
    tied = two[:, None] & (stand[:, None] == stand[None, :])
    order = torch.arange(len(group), device=group.device)
    chosen = same & ((stand[:, None] > stand[None, :]) | (tied & (order[:, None] < order[None, :])))
    first, second = chosen.nonzero(as_tuple=True)
    p = torch.where(two[first], batch.target_probs[first], torch.ones_like(stand[first]))
    return Pairs(first, second, p)


def link_loss(h: Tensor, link: str, epsilon: float = 0.0) -> Tensor:
    """f(h) of margins h [P] in nats; -log σ(h) for logistic.

    hinge: max(0, 1-h) (SLiC, arXiv:2305.10425). robust: (-(1-ε) log σ(h) + ε log σ(-h))/(1-2ε) (arXiv:2403.00409, eq. 12).
    conservative: -(1-ε) log σ(h) - ε log σ(-h) (arXiv:2305.18290's smoothed labels).
    """
    if link == "hinge":
        return relu(1 - h)
    if link == "robust":
        return (-(1 - epsilon) * logsigmoid(h) + epsilon * logsigmoid(-h)) / (1 - 2 * epsilon)
    if link == "conservative":
        return -(1 - epsilon) * logsigmoid(h) - epsilon * logsigmoid(-h)
    assert link in ("logistic", "odds_ratio"), link
    return -logsigmoid(h)


def soft(losses: Tensor, flipped: Tensor, p: Tensor) -> Tensor:
    """p·f(h) + (1-p)·f(-h): the expected loss where the first response is preferred with probability p [P]."""
    return torch.where(p == 1, losses, p.to(losses) * losses + (1 - p).to(losses) * flipped)


def matrix(values: Tensor, batch: Batch, fill: float) -> Tensor:
    """values [responses] as [groups, K], K the most responses of a Group, `fill` where a Group has fewer."""
    counts = torch.bincount(batch.group, minlength=len(batch.ids))
    order = torch.argsort(batch.group, stable=True)
    column = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[batch.group[order]]
    out = values.new_full((len(batch.ids), int(counts.max())), fill)
    return out.index_put((batch.group[order], column), values[order])


def extremes(batch: Batch) -> tuple[Tensor, Tensor]:
    """The best and the worst response of each Group, [groups] indices of responses; the first among equals."""
    index = torch.arange(len(batch.group), device=batch.group.device)
    stand = batch.standings
    at = matrix(index, batch, 0)
    best = matrix(stand, batch, float("-inf")).argmax(1, keepdim=True)
    worst = matrix(stand, batch, float("inf")).argmin(1, keepdim=True)
    return at.gather(1, best).squeeze(1), at.gather(1, worst).squeeze(1)


def means(columns: dict[str, Tensor]) -> Records:
    """Columns [groups] whose means are reported, as sums with counts: never taken for proportions, whatever their values."""
    found: Records = {}
    for name, values in columns.items():
        found[f"{name}_sum"] = values.double().cpu().numpy()
        found[f"{name}_count"] = np.ones(len(values))
    return found


def pair_stats(h: Tensor, batch: Batch) -> dict[str, tuple[Tensor, float]]:
    """For the log, (sum, count) over pairs of margins h [P]: their mean, and how many are right (½ on a tie)."""
    right = (h > 0).double() + 0.5 * (h == 0).double()
    n = float(len(h)) * batch.weight
    return {"margin": (h.sum() * batch.weight, n), "pair_accuracy": (right.sum() * batch.weight, n)}


def pair_records(h: Tensor, pairs: Pairs, batch: Batch, asked: Asked) -> Records:
    """Sums over each Group's pairs, fp64: accuracy (½ on a tie; pairs without a preferred side left out), nll, margin, brier,
    the histogram of confidences folded onto [½, 1], and what fitting a temperature needs. h: [P] margins of the first over
    the second.
    """
    margin, p = h.double().cpu().numpy(), pairs.p.double().cpu().numpy()
    owner, count = batch.group[pairs.first].cpu().numpy(), len(batch.ids)
    decided = p != 0.5
    confidence = expit(np.abs(margin) / asked.temperature)
    correct = np.where(margin > 0, 1.0, np.where(margin == 0, 0.5, 0.0))

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, count).astype(np.float64)

    nll = p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)
    ones = np.ones_like(margin)
    return {
        "pair_accuracy_sum": total(correct * decided),
        "pair_accuracy_count": total(decided.astype(np.float64)),
        "nll_sum": total(nll),
        "nll_count": total(ones),
        "margin_sum": total(margin),
        "margin_count": total(ones),
        "brier_sum": total(p * expit(-margin) ** 2 + (1 - p) * expit(margin) ** 2),
        "brier_count": total(ones),
        **fine_bins(confidence[decided], correct[decided], owner[decided], count, asked.bins, 0.5, 1.0),
        **_grid_records(margin, p, owner, count),
    }


def _grid_records(margin: np.ndarray, p: np.ndarray, owner: np.ndarray, count: int) -> Records:
    """Logits [h, 0] with the label on the first (p of it): Σ log(1+e^βh), its derivative, and Σ p·h, on the grid of β."""
    betas = temperature_grid()
    scaled = betas * margin[:, None]
    sums = {"grid_logsumexp": np.logaddexp(0, scaled), "grid_slope": margin[:, None] * expit(scaled)}
    records = {}
    for name, values in sums.items():
        records[name] = np.zeros((count, len(betas)))
        np.add.at(records[name], owner, values)
    return {**records, "grid_label": np.bincount(owner, p * margin, count).astype(np.float64)}


def reference_records(logprobs: Tensor, batch: Batch) -> Records:
    """kl: Σ_t ½δ², δ = log π_θ - log π_ref, over the data's own response tokens, and their number.

    The estimator k2 of Schulman (joschu.net/blog/kl-approx), nats a token: near the reference the KL of tokens drawn from
    either; on other people's responses a measure of how far the policy has moved there, 0 only where it has not. (k3's
    exponential has tails there that no interval survives.)
    """
    assert batch.reference is not None
    delta = (logprobs - batch.reference).double()
    owner = batch.group[batch.response]
    total = torch.zeros(len(batch.ids), dtype=torch.float64, device=delta.device)
    moved = total.index_add(0, owner, delta**2 / 2)
    tokens = total.index_add(0, owner, torch.ones_like(delta))
    return {"kl_sum": moved.cpu().numpy(), "kl_count": tokens.cpu().numpy()}
