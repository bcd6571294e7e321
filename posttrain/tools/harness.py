"""Tasks of EleutherAI's lm-evaluation-harness on our model: `posttrain eval eval.harness=[arc_easy]`, an extra.

Tasks, prompts, filters and metrics are lm-eval's; the network is the one our own loading gives (runs, adapters, precision),
and the intervals are ours (harness_scores.py). harness_tasks.py finds the tasks, with their data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ModelError
from posttrain.evaluate import AT_THE_END
from posttrain.seeds import seed_everything
from posttrain.tools.harness_scores import Scoring, TaskScores, score_group, score_task
from posttrain.tools.harness_tasks import Tasks, listed
from posttrain.tools.harness_warnings import first_line, heard

if TYPE_CHECKING:
    from posttrain.config import Config, EvalConfig
    from posttrain.runtime import Runtime

ROWS = 8
"""Prompts of one forward where batch.* says nothing: lm-eval forms the logits of every position at once."""


@dataclass
class HarnessResult:
    """metrics: harness/<task>/<metric>. tasks: what is written of each. lines: what is said. facts: for environment.json."""

    metrics: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskScores] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def run_tasks(cfg: Config, tasks: Tasks, network: Any, tokenizer: Any, runtime: Runtime) -> HarnessResult:
    """Run them on this network (a transformers causal language model) and score each."""
    chat = _in_chat(cfg.data.template, tokenizer)
    for task in tasks.single.values():
        _set_shots(task, cfg.eval.harness_shots, cfg.train.seed)
    found, warned = _run(cfg, tasks, network, tokenizer, runtime, chat)
    resamples = cfg.eval.resamples or AT_THE_END
    scoring = Scoring(cfg.eval.confidence_level, resamples, cfg.train.seed)
    result = HarnessResult(lines=[_told_chat(chat, tokenizer), *tasks.heard, *warned])
    for name, task in tasks.single.items():
        scores = score_task(name, found["samples"][name], found["results"][name], task, scoring)
        result.tasks.append(scores)
        result.facts[name] = _facts(found, name)
        result.lines += [_told(name, result.facts[name], cfg.eval), *scores.lines]
        result.metrics |= {f"harness/{name}/{metric}": value for metric, value in scores.metrics.items()}
    by_name = {scores.name: scores for scores in result.tasks}
    for name, members in tasks.groups.items():
        pooled = score_group(found["results"].get(name, {}), [by_name[member] for member in members], scoring)
        result.metrics |= {f"harness/{name}/{metric}": value for metric, value in pooled.items()}
    return result


def _run(
    cfg: Config, tasks: Tasks, network: Any, tokenizer: Any, runtime: Runtime, chat: bool
) -> tuple[dict[str, Any], list[str]]:
    """lm-eval's results with every sample, and what it warned of."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    mixed = None if runtime.compute_dtype == torch.float32 else runtime.compute_dtype
    with heard() as warned:
        lm = HFLM(  # log-probs in fp32: in bf16, choices that differ by a little would tie
            network, tokenizer=tokenizer, batch_size=_rows(cfg), mixed_precision_dtype=mixed, softmax_dtype=torch.float32
        )  # fmt: skip
        seed_everything(cfg.train.seed, 0)
        try:
            found = evaluate(
                lm, tasks.loaded, limit=cfg.eval.harness_limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=chat, fewshot_as_multiturn=chat,
            )  # fmt: skip
        except (AssertionError, ValueError, ImportError) as error:  # too long for the model, a metric's package, ...
            raise ModelError(f"eval.harness={listed(cfg.eval.harness)}: lm-eval says: {first_line(error)}") from error
    assert found is not None
    return dict(found), warned


def _set_shots(task: Any, shots: int | None, seed: int) -> None:
    """As lm-eval's command line does: a task that sets 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _in_chat(template: str, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template, by data.template."""
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError(
            "data.template=chat, but the tokenizer has no chat template; set model.chat_template, or leave it out"
        )
    return template != "none" and bool(tokenizer.chat_template)


def _rows(cfg: Config) -> int:
    """Prompts of one forward."""
    if cfg.batch.micro_size:
        return int(cfg.batch.micro_size)
    return max(1, cfg.batch.micro_tokens // cfg.data.max_length) if cfg.batch.micro_tokens else ROWS


def _facts(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a score of this task depends on besides the model."""
    counted = found["n-samples"][name]
    return {
        "version": found["versions"][name],
        "shots": found["n-shot"][name],
        "documents": counted["effective"],
        "documents_in_all": counted["original"],
    }


def _told_chat(chat: bool, tokenizer: Any) -> str:
    if chat:
        return "harness: prompts in the chat template, few-shot examples as its turns (data.template=none: plain text)"
    why = "data.template=none" if tokenizer.chat_template else "the tokenizer has no chat template"
    return f"harness: prompts as plain text ({why})"


def _told(name: str, facts: dict[str, Any], options: EvalConfig) -> str:
    count, whole = facts["documents"], facts["documents_in_all"]
    documents = f"{count:,} documents" if count == whole else f"the first {count:,} of {whole:,} documents"
    kept = options.harness_shots is not None and facts["shots"] != options.harness_shots
    shots = f"{facts['shots']} few-shot examples" + (
        f" (set by the task itself, so not {options.harness_shots})" if kept else ""
    )
    return f"harness/{name}: {documents}, {shots}, version {facts['version']}"
