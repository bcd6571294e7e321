"""What is pooled between two log lines: sums and counts over micro-batches, ranks and steps, divided once when told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.models.router import EXPERT_LOAD
from posttrain.runtime import Runtime
from posttrain.stages.base import Loss

Pooled = dict[str, list[Any]]
TERM = "term/"
PEAK = "peak/"
ALIKE = ("grad_norm", "clipped")
"""Known to every rank alike: never summed over ranks."""


class Meter:
    """sums: name → [sum, count]; losses stay on their device until a line is due, so that no step waits for them."""

    def __init__(self, runtime: Runtime, weights: dict[str, float], pooled: list[Pooled]) -> None:
        """pooled: what a checkpoint kept, one a rank."""
        self.runtime, self.weights = runtime, weights
        self.sums = _share_of(pooled, runtime.rank, runtime.world)
        self.tokens, self.seconds, self.steps = 0, 0.0, 0
        self.line = (0, 0.0)

    def add_loss(self, loss: Loss, counts: dict[str, float]) -> None:
        """One micro-batch's terms and stats."""
        for name, term in loss.terms.items():
            self._add(f"{TERM}{name}", term.detach(), counts[name])
        for name, (total, count) in loss.stats.items():
            self._add(name, total, count)
        for name, value in loss.peaks.items():
            pair = self.sums.setdefault(f"{PEAK}{name}", [0.0, 1.0])
            pair[0] = torch.maximum(torch.as_tensor(pair[0]).to(value), value)

    def add_step(self, norm: float | None, max_norm: float, tokens: int, seconds: float) -> None:
        """One optimizer step; this process's first is not timed, for it warms up. norm: None where it was skipped."""
        if norm is not None:
            self._add("grad_norm", norm, 1.0)
            self._add("clipped", float(norm > max_norm), 1.0)
        self.steps += 1
        self.line = (self.line[0] + tokens, self.line[1] + seconds)
        if self.steps > 1:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Over optimizer-step time, all ranks."""
        return self.tokens / self.seconds if self.seconds else None

    def since(self) -> dict[str, float]:
        """Of the optimizer steps since this was asked last: update_seconds, and tokens per second."""
        (tokens, seconds), self.line = self.line, (0, 0.0)
        return {"update_seconds": seconds, "update_tokens_per_second": tokens / max(seconds, 1e-9)}

    def state(self) -> dict[str, list[float]]:
        """The sums as numbers, for a checkpoint."""
        return {name: [float(total), float(count)] for name, (total, count) in self.sums.items()}

    def flush(self) -> dict[str, float]:
        """Each sum over all ranks divided by its count, peaks as they are, and `loss`, the weighted terms; then start
        afresh."""
        sums, self.sums = self.state(), {}
        peaks = {name: sums.pop(name)[0] for name in list(sums) if name.startswith(PEAK)}
        everywhere = self.runtime.gather([peaks]) if peaks else []
        flat = {f"{name}/{i}": v for name, pair in sums.items() if name not in ALIKE for i, v in enumerate(pair)}
        flat = self.runtime.global_sum(flat)
        means = {name: flat[f"{name}/0"] / max(flat[f"{name}/1"], 1e-9) for name in sums if name not in ALIKE}
        means |= {name: sums[name][0] / sums[name][1] for name in ALIKE if name in sums}
        terms = {name: means.pop(name) for name in list(means) if name.startswith(TERM)}
        loss = sum(self.weights.get(name.removeprefix(TERM), 1.0) * value for name, value in terms.items())
        loads = [means.pop(name) for name in list(means) if name.startswith(EXPERT_LOAD)]
        if loads:  # known only now that every micro-batch and rank is in
            means |= {"expert_load_max": max(loads), "expert_load_min": min(loads)}
        means |= {name.removeprefix(PEAK): max(each[name] for each in everywhere) for name in peaks}
        return {"loss": loss, **means}

    def _add(self, name: str, total: Tensor | float, count: float) -> None:
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] = pair[0] + (total.double() if isinstance(total, Tensor) else total)
        pair[1] += count


def _share_of(pooled: list[Pooled], rank: int, world: int) -> Pooled:
    """This rank's sums; where another number of ranks goes on, rank 0 has them all and the others zeros."""
    if not pooled or len(pooled) == world:
        return pooled[rank] if pooled else {}
    names = pooled[0] if rank == 0 else {}
    pool = {name: max if name.startswith(PEAK) else sum for name in names}
    whole = {name: [pool[name](each[name][i] for each in pooled) for i in (0, 1)] for name in names}
    zeros: Pooled = {name: [0.0, 0.0] for name in pooled[0]}
    return zeros | whole | {name: list(pooled[0][name]) for name in ALIKE if name in pooled[0]}
