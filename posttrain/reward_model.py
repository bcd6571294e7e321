"""A trained reward model as a judge: its own tokenizer and template read what was asked and answered, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.data.encoding import Encoding
from posttrain.data.group import Group, Message, Text
from posttrain.data.loader import evaluation_batches, gather
from posttrain.data.packing import Packing
from posttrain.data.tokenize import Tokenizer, end_ids
from posttrain.data.tokens import Examples
from posttrain.errors import ModelError
from posttrain.models.lineage import is_reward_model, resolve_path
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.networks import Head, build_network
from posttrain.models.others import other_model, told_of
from posttrain.models.placement import Kept
from posttrain.models.reward import POOLING_KEY
from posttrain.models.rope import position_limit
from posttrain.rewards import Judged, Row

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.runtime import Runtime

MICRO_TOKENS = {"cpu": 4_096, "cuda": 65_536}


class RewardModelJudge:
    """R(x, y) of the model at model.reward, on the run's device, in its precision."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        model = other_model(cfg.model, cfg.model.reward)
        with told_of("model.reward"):
            config = load_config(model)
            scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
            if not scores and not is_reward_model(resolve_path(cfg.model.reward)):  # an adapter's config is its base's
                raise ModelError(
                    f"model.path={cfg.model.reward} is a {', '.join(config.architectures or ['model without architectures'])}, "
                    "which has no score layer; give a model that stage=reward has trained"
                )
            tokenizer = load_tokenizer(model)
            self.ends = end_ids(tokenizer)
            head = Head(getattr(config, POOLING_KEY, "last"), frozenset(self.ends))
            adapter = replace(cfg.adapter, name="none", path=None)
            network = build_network(model, adapter, runtime.compute_dtype, cfg.train.seed, head=head)[0]
        self.kept = Kept(network, cfg.model.frozen_device, runtime.device)
        self.runtime, self.tokenizer = runtime, tokenizer
        template = "chat" if tokenizer.chat_template else "none"
        limit = position_limit(config) or 2**20
        self.encoding = Encoding(template, limit, "truncate", "response", closes=True)
        self.packing = Packing("padded", MICRO_TOKENS[self.kept.device.type])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Row]) -> Judged:
        worker = Tokenizer(self.tokenizer, self.encoding)
        asked = [as_text(prompt) for prompt in prompts]
        groups = list(worker.groups(_group(a, r) for a, r in zip(asked, responses, strict=True)))
        if len(groups) != len(prompts):
            raise ModelError(
                f"{len(prompts) - len(groups)} of {len(prompts)} prompts leave no room for an answer in the "
                f"{self.encoding.max_length} positions of model.reward; lower data.max_length"
            )
        data, scores = Examples(groups), np.zeros(len(groups))
        with self.kept() as network, self.runtime.autocast(self.kept.device):
            for positions, members in evaluation_batches(data, self.packing):
                found = network(gather(data, positions, members, "padded").to(self.kept.device))
                scores[positions[[i for member in members for i in member]]] = found.rewards.float().cpu().numpy()
        return Judged(scores.tolist())


def as_text(prompt: Any) -> Text:
    """A prompt as it stands in a Group's JSON, text or message objects, as the Group had it."""
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(m["role"], m["content"], m.get("train"), m.get("extra") or {}) for m in prompt)


def _group(prompt: Text, response: str) -> Group:
    if isinstance(prompt, str):
        return Group(prompt, (response,))
    return Group(prompt, ((Message("assistant", response),),))
