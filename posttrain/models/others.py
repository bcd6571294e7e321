"""Models beside the one that trains: reference, reward model, critic. Each comes from its own key and keeps its own settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.config import ModelConfig


def other_model(model: ModelConfig, path: str | None) -> ModelConfig:
    """model.* for the model at `path`: what was said of the trained model's own files does not hold for it."""
    return replace(
        model, path=path, tokenizer=None, revision=None, gguf_file=None, init="weights", config={}, rope_scaling=None,
        chat_template=None, critic=None,
    )  # fmt: skip


@contextmanager
def told_of(key: str) -> Iterator[None]:
    """What goes wrong with it names its own key, such as model.reference."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.path", key)) from error
