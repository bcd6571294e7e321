"""How a run is put on the disk: a model and an optimizer that are whole, or, where weights lie in parts on the ranks, in parts.

An adapter is small, so it is put together and saved whole however its base lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from posttrain import checkpoint
from posttrain.checkpoint import TrainState
from posttrain.disk import writing
from posttrain.models.export import save_config, save_model
from posttrain.models.lineage import SHARDS
from posttrain.models.networks import Networks
from posttrain.models.sharding import is_sharded, whole, whole_state
from posttrain.shards import write_shard

if TYPE_CHECKING:
    from posttrain.runtime import Runtime


def save_checkpoint(
    root: Path,
    state: TrainState,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    rng: list[dict[str, Any]],
    ends: set[int],
    runtime: Runtime,
) -> None:
    """One checkpoint, complete or absent; every rank must come here. rng: every rank's random state."""
    if not (is_sharded(networks.module) and networks.adapter == "none"):
        weights = collected(networks, runtime)
        moments = whole_optimizer(optimizer) if runtime.zero is None else runtime.zero.state()
        if runtime.is_main:
            save = lambda path: save_model(networks, path, ends, state=weights)  # noqa: E731
            checkpoint.save(root, state, moments, rng, save)
        runtime.barrier()
        return
    scratch = checkpoint.scratch_of(root, state.step)
    with (
        checkpoint.in_parts(root, state, rng, lambda path: save_config(networks, path, ends))
        if runtime.is_main
        else writing(root)
    ):
        runtime.barrier()  # rank 0 has made the folder
        with writing(scratch):
            write_shard(scratch / SHARDS, runtime.rank, runtime.world, networks.module, optimizer)
        runtime.barrier()  # all files are there
    runtime.barrier()


def collected(networks: Networks, runtime: Runtime) -> dict[str, torch.Tensor] | None:
    """The module's whole tensors on rank 0, of an adapter what trains; None where they lie there whole, each by itself."""
    trained_alone = networks.adapter != "none"
    if runtime.zero is not None:
        return runtime.zero.weights(runtime.is_main, trained_alone)
    if not is_sharded(networks.module):
        return None
    return whole_state(networks.module, runtime.is_main, trained_alone)


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, its tensors whole; every rank must ask."""
    saved = optimizer.state_dict()
    state = {
        index: {key: whole(value).cpu() if isinstance(value, DTensor) else value for key, value in moments.items()}
        for index, moments in saved["state"].items()
    }
    return saved | {"state": state}
