"""The frozen reference of a stage that samples: the policy without its fresh adapter, a copy of the start, or another model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from posttrain.companions import is_policy_itself
from posttrain.models.placement import Kept
from posttrain.reference import reference_network

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.runtime import Runtime

Frozen = Callable[[], AbstractContextManager[Any]]


def open_frozen(cfg: Config, runtime: Runtime, policy: Any, is_start: bool) -> Frozen:
    """policy: the bare one. is_start: it is still the start; else the reference is built again from where the run began."""
    if is_policy_itself(cfg):
        return lambda: _without_adapter(policy)
    if runtime.shards:  # parts cannot be copied as they are: what the run began with is read once more
        network = reference_network(cfg, runtime).requires_grad_(False).eval()
        return lambda: nullcontext(network)
    same = cfg.model.reference is None and is_start and policy.gather_all is None  # parts cannot be copied
    reference = _copy(policy) if same else reference_network(cfg, runtime)
    return Kept(reference, cfg.model.frozen_device, runtime.device)


def _copy(policy: Any) -> Any:
    """Without the critic, which a reference has no use for."""
    critic, policy.critic = policy.critic, None
    try:
        return copy.deepcopy(policy)
    finally:
        policy.critic = critic


@contextmanager
def _without_adapter(policy: Any) -> Iterator[Any]:
    """A fresh adapter adds nothing (B = 0), so the policy without it is the policy as it was."""
    training = policy.training
    policy.eval()
    with policy.model.disable_adapter():
        yield policy
    policy.train(training)
