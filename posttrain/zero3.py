"""ZeRO 3: weights too are in parts on the ranks, each module's gathered for its own forward and backward.

Every rank begins with them whole (the start-up checks read them so) and keeps its part from the first evaluation on; where they
must be split from the start, distribution=fsdp does that. A copy of them, as a reference, is read anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.models.logprobs import is_plain_linear
from posttrain.zero import BUCKET, Zero

SMALL = 10_000
"""Weights of so few numbers, as those of norms, stay whole on every rank."""


class Zero3(Zero):
    """Zero with its weights in parts; `Zero` tells of the rest."""

    settings: ClassVar[dict[str, Any]] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_reuse_distance": BUCKET,  # by default a billion numbers may stay gathered
        "stage3_param_persistence_threshold": SMALL,
    }

    def __init__(self, policy: Any, *args: Any) -> None:
        head = getattr(policy, "head", None)
        if head is not None and not is_plain_linear(head):
            raise ConfigError(
                "distribution.zero_stage=3 with an output layer that is adapted or quantised: it is called for some tokens at a "
                "time, more often on one rank than on another, and ZeRO 3 waits for equal calls; set distribution=fsdp, or "
                "distribution.zero_stage=2"
            )
        super().__init__(policy, *args)
        from deepspeed.runtime.zero import register_external_parameter

        policy.gather_all = self._all_whole
        for parameter in () if head is None else head.parameters():  # log-probs read it without a call
            for module in (policy, self.policy):
                register_external_parameter(module, parameter)

    def _parts(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        zero = self.engine.optimizer
        return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))

    def _joined(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        pass  # the engine finds them by the parameter

    def _set(self, parameter: Tensor, value: Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        held: Any = parameter
        size = held.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(size)[dist.get_rank()], name)

    def _whole(self, tensor: Tensor, keep: bool) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            return super()._whole(tensor, keep)

    @contextmanager
    def _all_whole(self) -> Iterator[None]:
        """Every weight whole on every rank, and no gathering of single modules: ranks may do different numbers of forwards."""
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(self.engine):
            yield
