"""What a path means: a directory, a run's model, an adapter and the base below it, or a hub id."""

from __future__ import annotations

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from posttrain.errors import ModelError
from posttrain.models import embedded

NONLINEAR = "BOTTLENECK"
"""What adapter_config.json calls the adapters that no weights can take in (models/bottleneck.py)."""

SHARDS = "shards"
"""The folder of a checkpoint that holds weights and optimizer in parts."""

transformers_logging.disable_progress_bar()
hub_logging.set_verbosity_error()  # each retry is a warning there; what came of them stands in our one error


def resolve_path(path: str | None) -> str:
    """A directory as it is, a run's directory as its model/, `embedded` as the package's own, anything else as a hub id
    (checked for its form)."""
    assert path is not None, "config/check.py names a model wherever none is given"
    if path == "embedded":
        return str(embedded.DIRECTORY)
    directory = Path(path).expanduser()
    if (directory / "summary.json").is_file() or (directory / "checkpoints").is_dir():
        if not (directory / "model").is_dir():
            raise ModelError(
                f"the run {path} has no model/ yet: it is not finished. Give one of its checkpoints/step-…/model"
            )
        return str(directory / "model")
    if directory.exists():
        return str(directory)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        parent = Path(path).expanduser().parent
        siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(Path(path).name, siblings, n=1)
        hint = f"; did you mean {parent / near[0]}?" if near else ""
        raise ModelError(f"model.path={path} does not exist{hint}")
    return path


def lineage(path: str) -> tuple[str, list[str]]:
    """(base model, adapters from the innermost to this one); an adapter's base may itself be an adapter."""
    adapters: list[str] = []
    while (config := Path(path) / "adapter_config.json").is_file():
        if path in adapters:
            raise ModelError(f"{path} names itself as its base model")
        adapters.insert(0, path)
        path = _base_of(config)
    return path, adapters


def _base_of(config: Path) -> str:
    """The model that an adapter_config.json names."""
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        return resolve_path(base)
    except ModelError as error:
        raise ModelError(
            f"the adapter {config.parent} is of the model at {base}, which cannot be read ({error}); put it there, or write "
            f"where it is into {config} (base_model_name_or_path)"
        ) from error


def refuse_parts(path: str) -> None:
    """ModelError for the model/ of a checkpoint whose weights lie in parts beside it (shards.py)."""
    directory = Path(path)
    if (directory.parent / SHARDS).is_dir() and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"the weights of {path} lie in parts, a file a rank (distribution=fsdp); put them together first: "
            f"posttrain merge {directory.parent} OUT"
        )


def is_reward_model(path: str) -> bool:
    """Whether what was saved there has a score layer instead of an output layer."""
    adapter, config = Path(path) / "adapter_config.json", Path(path) / "config.json"
    if adapter.is_file():
        return bool(json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS")
    named = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return any(name.endswith("ForSequenceClassification") for name in named or ())


def nonlinear(path: str | None) -> list[str]:
    """The adapters on the way from the base to `path` that stay beside the weights."""
    found = lineage(resolve_path(path))[1]
    return [directory for directory in found if peft_type(directory) == NONLINEAR]


def peft_type(directory: str) -> str:
    """Which of peft's methods an adapter is of."""
    config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config.get("peft_type"))


def folded(path: str | None) -> str:
    """For the plan's line about the model: which base an adapter is folded into; nothing for a whole model."""
    base, adapters = lineage(resolve_path(path))
    how = "applied over" if nonlinear(path) else "folded into the weights of"
    return f" (adapter{'s' if len(adapters) > 1 else ''} {how} {base})" if adapters else ""


def fold(network: Any, directory: str) -> Any:
    """The network with the adapter saved there merged into its weights, or as a part of it where it is nonlinear. A language
    model's adapter also fits a network that has a score layer in place of the output layer."""
    from peft import PeftConfig, PeftModel

    from posttrain.models.bottleneck import settle  # peft knows the method from there

    config = PeftConfig.from_pretrained(directory)
    if config.task_type == "CAUSAL_LM":
        config.task_type = None  # peft would ask for what generates
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted: Any = PeftModel.from_pretrained(network, directory, config=config)
        except (OSError, ValueError, RuntimeError, UserWarning) as error:
            told = str(error).strip().splitlines()[0]
            raise ModelError(f"the adapter {directory} does not fit the model it names as its base: {told}") from error
    kept = config.peft_type == NONLINEAR
    whole = settle(adapted) if kept else adapted.merge_and_unload(safe_merge=True)
    for parameter in whole.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # peft froze them
    return whole
