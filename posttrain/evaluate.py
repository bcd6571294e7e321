"""Records → metrics. One row of fp64 sums an example, gathered from all ranks and sorted by id before anything is summed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain import stats
from posttrain.answers import Answers, Sample, rewarded
from posttrain.calibration import FITTED_TOKENS, usable
from posttrain.data.loader import evaluation_batches, gather
from posttrain.data.packing import Packing
from posttrain.data.token_dataset import TokenDataset
from posttrain.stages.base import Asked, Records, Stage

if TYPE_CHECKING:
    from posttrain.config import EvalConfig
    from posttrain.models.networks import Networks
    from posttrain.runtime import Runtime

WHILE_TRAINING, AT_THE_END = 1_000, 10_000


@dataclass
class Evaluation:
    """What one evaluation found; `records`, `calibrated` and `samples` are on rank 0 only.

    calibrated: the bins of the calibration error at the fitted temperature, where one was fitted, of the documents that it was
    not fitted to; nothing for the others.
    """

    step: int
    metrics: dict[str, Any]
    ids: list[str] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    records: Records = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    calibrated: Records = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The value of one metric; NaN where there is none."""
        found = self.metrics.get(name)
        value = found["value"] if isinstance(found, dict) else getattr(found, "value", found)
        return float("nan") if value is None else float(value)


class Evaluator:
    """Scores a stage on its evaluation data; batches are composed once, the same for any number of ranks."""

    def __init__(
        self,
        stage: Stage,
        networks: Networks,
        data: TokenDataset,
        packing: Packing,
        runtime: Runtime,
        options: EvalConfig,
        ends: set[int],
        seed: int,
    ) -> None:
        self.stage, self.networks, self.data, self.packing = stage, networks, data, packing
        self.runtime, self.options, self.seed = runtime, options, seed
        self.answers = Answers(networks, data, runtime, options, ends)
        self.batches = [] if stage.answer_tokens else evaluation_batches(data, packing, runtime.rank, runtime.world)
        self.fit_every = max(1, math.ceil(int(data.trained.sum()) / FITTED_TOKENS))

    @torch.no_grad()
    def __call__(self, step: int, final: bool = False, samples: bool = False) -> Evaluation:
        """Records and metrics at this step; with `samples` also generated answers; with `final` also a temperature, and what
        calibration is like at it."""
        self.networks.train(False)
        parts = self._scored(Asked(self.options.bins, fit_every=self.fit_every if final else 0))
        wanted = (samples or self.stage.answer_tokens) and self.options.generate and self.stage.generates
        answers = self.runtime.gather(self.answers() if wanted else [])
        found = Evaluation(step, {})
        if self.runtime.is_main:
            found = self._summarise(step, parts, answers, final)
        found.metrics = self.runtime.share(found.metrics)
        temperature = usable(found.metrics) if final else None
        if temperature is not None:
            parts = self._scored(Asked(self.options.bins, temperature))
            if self.runtime.is_main:
                self._add_calibrated(found, parts)
            found.metrics = self.runtime.share(found.metrics)
        self.networks.train(True)
        return found

    def _scored(self, asked: Asked) -> list[tuple[list[str], list[str], Records]]:
        """ids, clusters and records of every batch of every rank."""
        parts = []
        for positions, rows in self.batches:
            batch = gather(self.data, positions, rows, self.packing.layout).to(self.runtime.device)
            records = self.stage.score(self.networks, batch, asked)
            if rows:
                parts.append((batch.ids, batch.clusters, records))
        return self.runtime.gather(parts)

    def _add_calibrated(self, found: Evaluation, parts: list[Any]) -> None:
        """The bins at the fitted temperature, and the calibration error of the documents that it was not fitted to, before and
        after."""
        order = np.argsort(np.array([i for part in parts for i in part[0]]), kind="stable")
        names = [name for name in stats.BIN_COLUMNS if name in parts[0][2]]
        columns = {name: np.concatenate([part[2][name] for part in parts])[order] for name in names}
        fitted = ~stats.held_out(found.clusters, self.seed)  # [D]: the half that it was fitted to
        found.calibrated = stats.without(columns, fitted)
        for name, bins in (("ece_uncalibrated", found.records), ("ece_calibrated", found.calibrated)):
            found.metrics[name] = stats.held_out_ece(
                bins,
                found.clusters,
                level=self.options.confidence_level,
                resamples=self._resamples(True),
                seed=self.seed,
            )

    def _resamples(self, final: bool) -> int:
        return self.options.resamples or (AT_THE_END if final else WHILE_TRAINING)

    def _summarise(self, step: int, parts: list[Any], answers: list[Sample], final: bool) -> Evaluation:
        answers = sorted(answers, key=lambda sample: sample.id)
        if not parts and answers and answers[0].rewards:
            parts = [rewarded(answers)]  # they are all there is to score
        if not parts:
            return Evaluation(step, {}, samples=answers)
        ids = [i for part in parts for i in part[0]]
        clusters = [c for part in parts for c in part[1]]
        columns = {name: np.concatenate([part[2][name] for part in parts]) for name in parts[0][2]}
        unused = {
            name.removesuffix("_count") for name, c in columns.items() if name.endswith("_count") and _is_empty(c)
        }
        unused |= {"grid"} if "margin" in unused else set()  # responses judged one by one make no pairs
        columns = {n: c for n, c in columns.items() if n.rpartition("_")[0] not in unused}
        order = np.argsort(np.array(ids), kind="stable")
        ids, clusters = [ids[i] for i in order], [clusters[i] for i in order]
        columns = {name: column[order] for name, column in columns.items()}
        self._add_accuracy(columns, ids, answers)
        return Evaluation(step, self._metrics(columns, ids, clusters, final), ids, clusters, columns, answers)

    def _metrics(self, columns: Records, ids: list[str], clusters: list[str], final: bool) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(
            stats.summarise(
                {name: column for name, column in columns.items() if name != "accuracy"},
                ids,
                clusters,
                level=self.options.confidence_level,
                resamples=self._resamples(final),
                seed=self.seed,
                bins=self.options.bins,
            )
        )
        if "accuracy" in columns:
            metrics["accuracy"] = stats.accuracy(columns["accuracy"], clusters, self.options.confidence_level)
        return metrics

    def _add_accuracy(self, columns: Records, ids: list[str], answers: list[Sample]) -> None:
        """1 right, 0 wrong or unreadable, NaN where no answer was asked for."""
        verdicts = {sample.id: float(bool(sample.verdict)) for sample in answers if sample.verified}
        if verdicts:
            columns["accuracy"] = np.array([verdicts.get(i, np.nan) for i in ids])


def _is_empty(counts: np.ndarray) -> bool:
    """Whether nothing was counted, in numbers [D], in bins [D, B] or in the bins that hold something, an array each."""
    return not any(len(each) for each in counts) if counts.dtype == object else not counts.any()
