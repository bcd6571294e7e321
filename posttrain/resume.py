"""Going on from a checkpoint: which weights a run then starts from, whether they are its own, and the rest of its state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from posttrain.checkpoint import TrainState, load_optimizer, load_rng, load_state, reading, way_out
from posttrain.errors import CheckpointError, ModelError
from posttrain.models.lineage import SHARDS
from posttrain.models.load import load_config
from posttrain.models.networks import CRITIC
from posttrain.rundir import RECORD, RunDir
from posttrain.runtime import Runtime
from posttrain.seeds import seed_everything, set_rng_state
from posttrain.shards import read_shards

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig, Config, ModelConfig

SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size",
)  # fmt: skip
"""What two configs must share for one's weights to fit the other."""


def resumed(cfg: Config, run: RunDir) -> tuple[ModelConfig, AdapterConfig]:
    """model.* and adapter.* with the checkpoint's weights in place of those the run began with."""
    if run.checkpoint is None:
        return cfg.model, cfg.adapter
    saved = run.checkpoint / "model"
    has_adapter = (saved / "adapter_config.json").is_file()
    if has_adapter != (cfg.adapter.name != "none"):
        raise CheckpointError(
            f"{run.checkpoint} holds {'an adapter' if has_adapter else 'a whole model'}, but adapter={cfg.adapter.name}; "
            "go on with the config of the run it comes from"
        )
    critic = str(saved / CRITIC) if cfg.model.critic is not None else None
    if has_adapter:
        _check_adapter(cfg, saved)
        return replace(cfg.model, critic=critic), replace(cfg.adapter, path=str(saved))
    # what model.config and rope_scaling changed stands in the checkpoint's config already: not once more
    init: Literal["weights", "config"] = (
        "config" if in_parts(run.checkpoint) else "weights"
    )  # these are read by `restore`
    model = replace(
        cfg.model, path=str(saved), tokenizer=cfg.model.tokenizer or cfg.model.path, init=init, gguf_file=None,
        revision=None, config={}, rope_scaling=None, critic=critic,
    )  # fmt: skip
    pad = load_config(cfg.model).pad_token_id
    if (
        load_config(model).pad_token_id != pad
    ):  # a reward model is saved with another; its embedding row would not train
        model = replace(model, config={"pad_token_id": pad})
    _check_model(cfg, model)
    return model, cfg.adapter


@contextmanager
def loading(run: RunDir) -> Iterator[None]:
    """A ModelError about the checkpoint's own model says what to do about it."""
    try:
        yield
    except ModelError as error:
        if run.checkpoint is None or str(run.checkpoint) not in str(error):
            raise
        raise CheckpointError(f"{error}. If it is damaged, {way_out(run.checkpoint)}") from error


def in_parts(checkpoint: Path) -> bool:
    """Whether it holds weights and optimizer in parts."""
    return (checkpoint / SHARDS).is_dir()


def restore(
    run: RunDir, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, seed: int
) -> TrainState:
    """Optimizer, random states and counters of the checkpoint, and the weights where they are in parts; a fresh state where
    there is none."""
    seed_everything(seed, runtime.rank)
    if run.checkpoint is None:
        return TrainState()
    if in_parts(run.checkpoint):
        with reading(run.checkpoint, SHARDS):
            read_shards(run.checkpoint / SHARDS, policy, optimizer)
    else:
        load_optimizer(run.checkpoint, optimizer, as_read=runtime.zeros)
    rng = load_rng(run.checkpoint, runtime.rank)
    if rng is not None:
        with reading(run.checkpoint, "rng.pt"):
            set_rng_state(rng)
    return load_state(run.checkpoint)


def _check_model(cfg: Config, saved: ModelConfig) -> None:
    there, here = load_config(saved), load_config(cfg.model)
    other = [(name, getattr(there, name, None), getattr(here, name, None)) for name in SHAPE]
    told = [f"{name} {a} there, {b} in {cfg.model.path}" for name, a, b in other if a != b]
    if told:
        raise CheckpointError(f"{Path(str(saved.path)).parent} is of another model: {'; '.join(told[:3])}")


def _check_adapter(cfg: Config, saved: Path) -> None:
    """An adapter is read with its own rank (or width) and places, so the config must say the same."""
    asked = {name: value for name, value in asdict(cfg.adapter).items() if name not in ("path", "dropout")}
    record = saved.parent.parent.parent / RECORD
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8")).get("adapter", {})
    else:
        with reading(saved.parent, "model/adapter_config.json"):
            config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
            made = {"rank": config.get("r", asked["rank"]), "width": config.get("width", asked["width"])}
    told = [f"adapter.{name} {made[name]} there, {v} now" for name, v in asked.items() if made.get(name, v) != v]
    if told:
        raise CheckpointError(f"{saved.parent} holds another adapter: {'; '.join(told)}")
