"""Tasks of EleutherAI's lm-evaluation-harness on our model: `posttrain eval eval.harness=[arc_easy]`, an extra.

Tasks, prompts, filters and metrics are lm-eval's; the network is the one our own loading gives (runs, adapters, precision),
and the intervals are ours (harness_scores.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.evaluate import AT_THE_END
from posttrain.seeds import seed_everything
from posttrain.tools.harness_scores import Scoring, TaskScores, score_group, score_task

if TYPE_CHECKING:
    from posttrain.config import Config, EvalConfig
    from posttrain.runtime import Runtime

ROWS = 8
"""Prompts of one forward where batch.* says nothing: lm-eval forms the logits of every position at once."""
EXPECTED = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
"""What lm-eval warns of where it is handed a network, as we mean to."""


@dataclass
class Tasks:
    """What eval.harness names, with its data. loaded: lm-eval's TaskDict; heard: what lm-eval warned of meanwhile."""

    loaded: Any
    heard: list[str]

    @property
    def single(self) -> dict[str, Any]:
        """Each task by its name, those of groups too."""
        return dict(self.loaded["tasks"])

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names of each group's tasks."""
        found = self.loaded.get("groups", {})
        return {name: [task.task_name for task in group.get_all_tasks()] for name, group in found.items()}


@dataclass
class HarnessResult:
    """metrics: harness/<task>/<metric>. tasks: what is written of each. lines: what is said. facts: for environment.json."""

    metrics: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskScores] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def open_tasks(options: EvalConfig, world: int) -> Tasks:
    """The tasks and their data; ConfigError for names that are none, DataError for data that cannot be had."""
    if world > 1:
        raise ConfigError(f"eval.harness runs in one process, but {world} are running; start posttrain eval by itself")
    with _heard() as heard:
        manager = _manager(options)
        asked: list[Any] = []
        for name in options.harness:
            found = _load(manager, name)
            group = found.get("groups", {}).get(name)
            asked += [group] if group is not None else found["tasks"].values()
        try:
            tasks = Tasks(manager.load(asked), heard)
        except ValueError as error:  # the same task twice
            raise ConfigError(
                f"eval.harness={_listed(options.harness)}: {_first_line(error)}; name each once"
            ) from error
    for name, task in tasks.single.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"eval.harness: the task {name} runs code that the model writes, which posttrain does not; leave it out, or "
                "run lm-eval itself on the saved model where that is safe"
            )
    return tasks


def run_tasks(cfg: Config, tasks: Tasks, network: Any, tokenizer: Any, runtime: Runtime) -> HarnessResult:
    """Run them on this network (a transformers causal language model) and score each."""
    chat = _in_chat(cfg.data.template, tokenizer)
    for task in tasks.single.values():
        _set_shots(task, cfg.eval.harness_shots, cfg.train.seed)
    found, heard = _run(cfg, tasks, network, tokenizer, runtime, chat)
    resamples = cfg.eval.resamples or AT_THE_END
    scoring = Scoring(cfg.eval.confidence_level, resamples, cfg.train.seed)
    result = HarnessResult(lines=[_told_chat(chat, tokenizer), *tasks.heard, *heard])
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
    with _heard() as heard:
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
            raise ModelError(f"eval.harness={_listed(cfg.eval.harness)}: lm-eval says: {_first_line(error)}") from error
    assert found is not None
    return dict(found), heard


def _manager(options: EvalConfig) -> Any:
    """The index of tasks that knows all names; of lm-eval's own 14,000 names only where harness_path has not all of them,
    for reading those takes ten seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("eval.harness needs the package lm-eval; pip install 'posttrain[harness]'") from error
    if not hasattr(TaskManager, "load"):
        raise ConfigError("eval.harness needs lm-eval 0.4.12 or later; pip install 'posttrain[harness]'")
    path = options.harness_path
    if path is not None:
        if not Path(path).is_dir():
            raise ConfigError(f"eval.harness_path={path} is no folder; give one that holds task YAMLs")
        own = TaskManager(include_path=path, include_defaults=False)
        if set(options.harness) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=path)
    for name in options.harness:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            tip = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise ConfigError(f"eval.harness: {name} is no task or group of lm-eval{_or_of(path)}; {tip}")
    return manager


def _load(manager: Any, name: str) -> Any:
    """One name's tasks with their data."""
    try:
        return manager.load([name])
    except Exception as error:  # the libraries below raise a dozen kinds, all of them meaning that it cannot be had
        raise DataError(
            f"eval.harness: the task {name} cannot be loaded: {_first_line(error)}; its data comes from where its YAML says, "
            "mostly from the hub: fetch it once where there is a network, or name local files in a YAML of your own "
            "(eval.harness_path)"
        ) from error


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


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What lm-eval warns of within the block, filled in at its end: alike but for numbers, it is told once and counted."""
    said: dict[str, list[str]] = {}
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if not text.startswith(EXPECTED):
                said.setdefault(re.sub(r"\d+", "#", text), []).append(text)

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield told
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagated
        told += [f"lm-eval warns{_times(len(texts))}: {texts[0][:300]}" for texts in said.values()]


def _times(count: int) -> str:
    return f" {count:,} times, first" if count > 1 else ""


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _listed(names: list[str]) -> str:
    return f"[{','.join(names)}]"


def _or_of(path: str | None) -> str:
    return f" or of eval.harness_path={path}" if path else ""
