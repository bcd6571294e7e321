"""Evaluation prompts answered: greedily, verified, rewarded, and where the stage samples also by sampling."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.token_dataset import TokenDataset
from posttrain.data.tokens import TokenGroup
from posttrain.rollout import generate
from posttrain.stages.base import Records
from posttrain.verify import VERIFIERS, require

if TYPE_CHECKING:
    from posttrain.config import EvalConfig
    from posttrain.judge import Judge
    from posttrain.models.networks import Networks
    from posttrain.runtime import Runtime

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


class Answers:
    """Answers the first eval.generate prompts, in the order of their ids. ends: tokens at which an answer stops.

    judge: rewards them, where the stage has rewards. sampled: a sampling stage's scores of answers that it draws itself.
    """

    def __init__(
        self, networks: Networks, data: TokenDataset, runtime: Runtime, options: EvalConfig, ends: set[int]
    ) -> None:
        require(options.verifier)
        self.networks, self.data, self.runtime, self.options, self.ends = networks, data, runtime, options, ends
        self.judge: Judge | None = None
        self.sampled: Callable[[list[TokenGroup]], list[dict[str, float]]] | None = None

    def __call__(self) -> list[Sample]:
        """This rank's share."""
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
        if self.sampled is not None:  # every rank takes part in all of them
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
