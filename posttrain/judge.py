"""The rewards of a run, together: what each gives the answers to a batch of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.data.tokens import TokenGroup
from posttrain.errors import ConfigError, DataError
from posttrain.generation import Generation
from posttrain.reward_model import RewardModelJudge
from posttrain.rewards import Reward, open_reward

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.runtime import Runtime


@dataclass
class Verdicts:
    """scores: reward → a number for each answer, NaN where it failed. unreadable: answers that a verifier could not read.
    weights: of the rewards in their sum. texts: the answers as they were read."""

    scores: dict[str, list[float]]
    unreadable: int = 0
    weights: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def each(self) -> list[dict[str, float]]:
        """For each answer its rewards; `reward` is their weighted sum."""
        rows = list(zip(*self.scores.values(), strict=True))
        found = []
        for row in rows:
            total = {"reward": sum(w * v for w, v in zip(self.weights, row, strict=True))}
            found.append(
                total | ({f"reward_{n}": v for n, v in zip(self.scores, row, strict=True)} if len(row) > 1 else {})
            )
        return found


class Judge:
    """Calls every reward with text: prompts as they stand in the data, answers without special tokens, the rows' columns.

    DataError where a larger share than `limit` of the answers could not be rewarded.
    """

    def __init__(self, rewards: dict[str, Reward], weights: list[float], limit: float, tokenizer: Any) -> None:
        self.rewards, self.weights, self.limit, self.tokenizer = rewards, weights, limit, tokenizer

    def __call__(self, prompts: Sequence[TokenGroup], answers: Sequence[Generation]) -> Verdicts:
        if not answers:  # a rank whose share is none
            return Verdicts({name: [] for name in self.rewards}, weights=self.weights)
        texts = self.tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
        data = [json.loads(group.text) for group in prompts]
        asked, rows = [each["prompt"] for each in data], [each["columns"] for each in data]
        found, failures = Verdicts({}, weights=self.weights, texts=texts), dict[str, int]()
        for name, reward in self.rewards.items():
            judged = reward(asked, texts, rows)
            found.scores[name] = judged.scores
            found.unreadable += judged.unreadable
            if judged.failure:
                failures[judged.failure] = sum(score != score for score in judged.scores)
        if sum(failures.values()) > self.limit * len(answers):
            raise DataError(
                f"{max(failures.values())} of {len(answers)} responses could not be rewarded, more than "
                f"stage.max_failed_fraction={self.limit:g} allows: {'; '.join(failures)}"
            )
        return found


def open_judge(cfg: Config, runtime: Runtime, tokenizer: Any) -> Judge:
    """stage.rewards, each opened; ConfigError for one that cannot be."""
    stage: Any = cfg.stage
    if ("model" in stage.rewards) != (cfg.model.reward is not None):
        raise ConfigError(
            f"stage.rewards=[{', '.join(stage.rewards)}] and model.reward={cfg.model.reward}: a reward model needs both, "
            "stage.rewards=[model] and model.reward=PATH"
        )
    rewards: dict[str, Reward] = {
        spec: RewardModelJudge(cfg, runtime) if spec == "model" else open_reward(spec, stage.reward_seconds)
        for spec in stage.rewards
    }
    return Judge(rewards, list(stage.reward_weights or [1.0] * len(rewards)), stage.max_failed_fraction, tokenizer)
