"""The frozen reference of a stage that samples: the policy without its fresh adapter, a copy of the start, or another model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from posttrain.models.networks import Networks
from posttrain.reference import reference_network

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.runtime import Runtime

Frozen = Callable[[Networks], AbstractContextManager[Any]]


def open_frozen(cfg: Config, runtime: Runtime, start: Any) -> Frozen:
    """start: the policy where it is still the start, else None, and the reference is built again from where the run began."""
    if cfg.model.reference is None and cfg.adapter.name != "none" and cfg.adapter.path is None:
        return _without_adapter
    is_start = cfg.model.reference is None and start is not None
    policy = copy.deepcopy(start) if is_start else reference_network(cfg, runtime)
    policy.requires_grad_(False)
    policy.eval()

    @contextmanager
    def kept(networks: Networks) -> Iterator[Any]:
        yield policy

    return kept


@contextmanager
def _without_adapter(networks: Networks) -> Iterator[Any]:
    """A fresh adapter adds nothing (B = 0), so the policy without it is the policy as it was."""
    with networks.module.model.disable_adapter():
        yield networks.module
