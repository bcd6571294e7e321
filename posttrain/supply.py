"""What a stage samples and judges with: who writes answers, what ends one, who gives rewards."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.data.packing import Packing
from posttrain.data.pipeline import Prepared
from posttrain.data.specials import end_ids, end_of_turn
from posttrain.evaluate import Evaluator
from posttrain.judge import open_judge
from posttrain.models.networks import Networks
from posttrain.rollout import InProcess, RolloutBackend
from posttrain.rollout_server import VLLMServer
from posttrain.rundir import RunDir
from posttrain.runtime import Runtime
from posttrain.stages.base import Supply

if TYPE_CHECKING:
    from posttrain.config import Config


def open_supply(cfg: Config, runtime: Runtime, packing: Packing, ends: set[int], tokenizer: Any, run: RunDir) -> Supply:
    """What the stage samples and judges with; a run that trains adds where its prompts come from."""
    supply = Supply(runtime, packing, cfg.train.seed, cfg.eval.confidence_level)
    if cfg.stage.answer_tokens:
        supply.judge = open_judge(cfg, runtime, tokenizer)
        supply.rollout = open_rollout(cfg, runtime, ends, tokenizer, run)
    return supply


def open_rollout(cfg: Config, runtime: Runtime, ends: set[int], tokenizer: Any, run: RunDir) -> RolloutBackend:
    """Who writes the answers: this process, or the server at stage.rollout_server."""
    stage: Any = cfg.stage
    if stage.rollout_server is not None:
        return VLLMServer(stage.rollout_server, run.path / "served", ends, runtime)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return InProcess(ends, pad, runtime)


def let_judge(evaluator: Evaluator, networks: Networks, supply: Supply) -> None:
    """Evaluation rewards its answers as training does, and draws some of its own where the stage samples."""
    evaluator.answers.judge = supply.judge
    if evaluator.stage.answer_tokens:
        evaluator.answers.sampled = partial(evaluator.stage.held_out, networks, supply)


def stop_ids(prepared: Prepared, tokenizer: Any) -> set[int]:
    """What ends a generated answer: end-of-text, and the end-of-turn token that training targets close with."""
    data = prepared.train if len(prepared.train) else prepared.eval
    examples = data.groups(range(min(64, len(data))))
    if not any(group.count for group in examples):
        return end_ids(tokenizer)
    found = end_of_turn(examples, end_ids(tokenizer))
    return {tokenizer.eos_token_id} | ({found} if found is not None else set())
