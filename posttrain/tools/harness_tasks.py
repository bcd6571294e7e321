"""The tasks that eval.harness names, with their data: found before a model is loaded, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, DataError
from posttrain.tools.harness_warnings import first_line, heard

if TYPE_CHECKING:
    from posttrain.config import EvalConfig


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


def open_tasks(options: EvalConfig, world: int) -> Tasks:
    """The tasks and their data; ConfigError for names that are none, DataError for data that cannot be had."""
    if world > 1:
        raise ConfigError(f"eval.harness runs in one process, but {world} are running; start posttrain eval by itself")
    with heard() as warned:
        manager = _manager(options)
        asked: list[Any] = []
        for name in options.harness:
            found = _load(manager, name)
            group = found.get("groups", {}).get(name)
            asked += [group] if group is not None else found["tasks"].values()
        try:
            tasks = Tasks(manager.load(asked), warned)
        except ValueError as error:  # the same task twice
            raise ConfigError(f"eval.harness={listed(options.harness)}: {first_line(error)}; name each once") from error
    for name, task in tasks.single.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"eval.harness: the task {name} runs code that the model writes, which posttrain does not; leave it out, or "
                "run lm-eval itself on the saved model where that is safe"
            )
    return tasks


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
            f"eval.harness: the task {name} cannot be loaded: {first_line(error)}; its data comes from where its YAML says, "
            "mostly from the hub: fetch it once where there is a network, or name local files in a YAML of your own "
            "(eval.harness_path)"
        ) from error


def listed(names: list[str]) -> str:
    """As eval.harness is written."""
    return f"[{','.join(names)}]"


def _or_of(path: str | None) -> str:
    return f" or of eval.harness_path={path}" if path else ""
