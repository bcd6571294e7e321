"""Records → metrics. One row of fp64 sums an example, gathered from all ranks and sorted by id before anything is summed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from posttrain import stats
from posttrain.data.loader import evaluation_batches, gather
from posttrain.data.packing import Packing
from posttrain.data.tokens import TokenDataset, TokenGroup
from posttrain.rollout import generate
from posttrain.stages.base import Records, Stage
from posttrain.verify import VERIFIERS, require

if TYPE_CHECKING:
    from posttrain.config import EvalConfig
    from posttrain.judge import Judge
    from posttrain.models.networks import Networks
    from posttrain.runtime import Runtime

WHILE_TRAINING, AT_THE_END = 1_000, 10_000
CONTINUATION_PROMPT = 16
"""Tokens of a plain document that are given when it is continued."""


@dataclass
class Sample:
    """One generated answer. verdict: right, wrong, or None where it was not verified or could not be read.

    question: the prompt as a person asked it, without the chat template.
    """

    id: str
    prompt: str
    answer: str
    reference: str
    finished: bool
    verdict: bool | None = None
    verified: bool = False
    question: str = ""
    cluster: str = ""
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What one evaluation found; `records` and `samples` are on rank 0 only."""

    step: int
    metrics: dict[str, Any]
    ids: list[str] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    records: Records = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

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
        require(options.verifier)
        self.stage, self.networks, self.data, self.packing = stage, networks, data, packing
        self.runtime, self.options, self.ends, self.seed = runtime, options, ends, seed
        self.judge: Judge | None = None
        self.sampled: Callable[[list[TokenGroup]], list[dict[str, float]]] | None = None  # a stage's that samples
        self.batches = [] if stage.answer_tokens else evaluation_batches(data, packing, runtime.rank, runtime.world)

    @torch.no_grad()
    def __call__(self, step: int, final: bool = False, samples: bool = False) -> Evaluation:
        """Records and metrics at this step; with `samples` also generated answers."""
        self.networks.train(False)
        parts: list[tuple[list[str], list[str], Records]] = []
        for positions, rows in self.batches:
            batch = gather(self.data, positions, rows, self.packing.layout).to(self.runtime.device)
            records = self.stage.score(self.networks, batch, self.options.bins)
            parts.append((batch.ids, batch.clusters, records))
        asked = (samples or self.stage.answer_tokens) and self.options.generate and self.stage.generates
        answers = self._generate() if asked else []
        parts, answers = self.runtime.gather(parts), self.runtime.gather(answers)
        self.networks.train(True)
        evaluation = self._summarise(step, parts, answers, final) if self.runtime.is_main else None
        metrics = self.runtime.share(evaluation.metrics if evaluation else None)
        return evaluation or Evaluation(step, metrics)

    def _summarise(self, step: int, parts: list[Any], answers: list[Sample], final: bool) -> Evaluation:
        answers = sorted(answers, key=lambda sample: sample.id)
        if not parts and answers and answers[0].rewards:
            parts = [rewarded(answers)]  # they are all there is to score
        if not parts:
            return Evaluation(step, {}, samples=answers)
        ids = [i for part in parts for i in part[0]]
        clusters = [c for part in parts for c in part[1]]
        columns = {name: np.concatenate([part[2][name] for part in parts]) for name in parts[0][2]}
        unused = {name.removesuffix("_count") for name, c in columns.items() if name.endswith("_count") and not c.any()}
        unused |= {"grid"} if "margin" in unused else set()  # responses judged one by one make no pairs
        columns = {n: c for n, c in columns.items() if n.rpartition("_")[0] not in unused}
        order = np.argsort(np.array(ids), kind="stable")
        ids, clusters = [ids[i] for i in order], [clusters[i] for i in order]
        columns = {name: column[order] for name, column in columns.items()}
        self._add_accuracy(columns, ids, answers)
        return Evaluation(step, self._metrics(columns, ids, clusters, final), ids, clusters, columns, answers)

    def _metrics(self, columns: Records, ids: list[str], clusters: list[str], final: bool) -> dict[str, Any]:
        resamples = self.options.resamples or (AT_THE_END if final else WHILE_TRAINING)
        metrics: dict[str, Any] = dict(
            stats.summarise(
                {name: column for name, column in columns.items() if name != "accuracy"},
                ids,
                clusters,
                level=self.options.confidence_level,
                resamples=resamples,
                seed=self.seed,
                bins=self.options.bins,
            )
        )
        if "accuracy" in columns:
            scored = columns["accuracy"][~np.isnan(columns["accuracy"])]
            metrics["accuracy"] = stats.wilson(scored.sum(), len(scored), level=self.options.confidence_level)
        return metrics

    def _add_accuracy(self, columns: Records, ids: list[str], answers: list[Sample]) -> None:
        """1 right, 0 wrong or unreadable, NaN where no answer was asked for."""
        verdicts = {sample.id: float(bool(sample.verdict)) for sample in answers if sample.verified}
        if verdicts:
            columns["accuracy"] = np.array([verdicts.get(i, np.nan) for i in ids])

    def _generate(self) -> list[Sample]:
        chosen = np.argsort(np.array(self.data.column("id")), kind="stable")[: self.options.generate]
        everyone = self.data.groups(chosen)
        if not everyone:
            return []
        groups = everyone[self.runtime.rank :: self.runtime.world]
        tokenizer = self.networks.tokenizer
        prompts = [prompt_tokens(group) for group in groups]
        with self.runtime.autocast():
            generated = generate(
                self.networks.module,
                prompts,
                self.ends,
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                self.options.max_new_tokens,
                device=self.runtime.device,
            )
        verify = VERIFIERS.get(self.options.verifier)
        rewards = self.judge(groups, generated).each() if self.judge else [{} for _ in groups]
        if self.sampled is not None:
            drawn = self.sampled(everyone)[self.runtime.rank :: self.runtime.world]
            rewards = [greedy | other for greedy, other in zip(rewards, drawn, strict=True)]
        samples = []
        for group, prompt, answer, judged in zip(groups, prompts, generated, rewards, strict=True):
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            reference = reference_answer(group, tokenizer)
            verdict = verify(text, reference) if verify else None
            shown = tokenizer.decode(prompt)
            samples.append(
                Sample(
                    group.id,
                    shown,
                    text,
                    reference,
                    answer.finished,
                    verdict,
                    verify is not None,
                    group.question,
                    group.cluster,
                    judged,
                )
            )
        return samples


def rewarded(answers: list[Sample]) -> tuple[list[str], list[str], Records]:
    """ids, clusters and a record of each answer's rewards (and of a sampled one's); one that failed counts for nothing."""
    columns: Records = {}
    for name in answers[0].rewards:
        values = np.array([answer.rewards[name] for answer in answers])
        columns[f"{name}_sum"], columns[f"{name}_count"] = np.nan_to_num(values), (~np.isnan(values)).astype(float)
    return [answer.id for answer in answers], [answer.cluster for answer in answers], columns


def prompt_tokens(group: TokenGroup) -> list[int]:
    """What generation is given: the prompt, or the beginning of a plain document."""
    if not group.count:
        return group.prompt
    if json.loads(group.text)["prompt"] is not None:
        return group.prompt + group.responses[0][: group.masks[0].index(True)]
    whole = group.prompt + group.responses[0]
    return whole[: min(CONTINUATION_PROMPT, (len(whole) + 1) // 2)]


def reference_answer(group: TokenGroup, tokenizer: Any) -> str:
    """The row's `answer` column, else the first trained turn of the best response: generation is given what stands before."""
    text = json.loads(group.text)
    if "answer" in text["columns"]:
        return str(text["columns"]["answer"])
    if not group.count:
        return ""
    if text["prompt"] is None:
        return str(text["responses"][0])
    k = int(np.argmax(group.standings)) if group.standings else 0
    response, mask = group.responses[k], group.masks[k]
    start = mask.index(True)
    stop = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
    return str(tokenizer.decode(response[start:stop], skip_special_tokens=True)).strip()


def write_records(path: Path, evaluation: Evaluation) -> None:
    """Per-example records, one row an example, for comparing runs without running a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"id": evaluation.ids, "cluster": evaluation.clusters}
    for name, column in evaluation.records.items():
        columns[name] = column if column.ndim == 1 else list(column)
    scratch = path.with_suffix(".tmp")
    try:
        pq.write_table(pa.table(columns), scratch)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def read_records(path: Path) -> tuple[list[str], list[str], Records]:
    """ids, clusters and columns as they were written."""
    table = pq.read_table(path)
    columns = {}
    for name in table.column_names[2:]:
        values = table[name].to_numpy(zero_copy_only=False)
        columns[name] = np.stack(list(values)) if values.dtype == object else values
    return table["id"].to_pylist(), table["cluster"].to_pylist(), columns
