"""A sharded run's weights and optimizer in a checkpoint: a safetensors file a rank, each tensor's rows with where they begin.

Any number of ranks can read them, one process too: each finds the rows it needs in whichever files have them. No part of it
can run code as it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from posttrain.errors import CheckpointError
from posttrain.models.sharding import reshard

FIRST_ROWS = "first_rows"
"""In a file's header: tensor → the row of the whole that its rows begin at."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_shard(directory: Path, rank: int, world: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """This rank's file. Tensors that lie whole on every rank are rank 0's."""
    parts: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for name, tensor in {**_weights(module), **_moments(module, optimizer)}.items():
        if isinstance(tensor, DTensor):
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            parts[name], first[name] = tensor.to_local().detach().cpu().contiguous(), int(offset[0])
        elif rank == 0:
            parts[name] = tensor.detach().cpu().contiguous()
    path = directory / f"{rank + 1:05d}-of-{world:05d}.safetensors"
    save_file(parts, path, metadata={FIRST_ROWS: json.dumps(first)})


@torch.no_grad()
def read_weights(directory: Path, module: nn.Module) -> _Saved:
    """Weights back into a module, in parts or whole; CheckpointError where they do not fit."""
    reshard(module)
    saved = _Saved(directory)
    for name, tensor in _weights(module).items():
        saved.read(name, tensor)
    return saved


@torch.no_grad()
def read_shards(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights, and moments of the optimizer."""
    saved = read_weights(directory, module)
    for name, parameter in _trained(module).items():
        if f"optimizer.{name}.step" not in saved.places:
            continue  # it had not moved yet: a critic that waits, an expert that was sent nothing
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        state |= {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
        for key, tensor in state.items():
            saved.read(f"optimizer.{name}.{key}", tensor)
        optimizer.state[parameter] = state


class _Saved:
    """places: tensor → (first row, file) of each part."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*-of-*.safetensors"))
        world = int(files[0].stem.rpartition("-")[2]) if files else 0
        if not world or len(files) != world:
            raise CheckpointError(
                f"{directory} holds {len(files)} of {world or 'no'} files; copy those that are missing"
            )
        self.files = [safe_open(path, framework="pt") for path in files]
        self.places: dict[str, list[tuple[int, Any]]] = {}
        for file in self.files:
            first = json.loads((file.metadata() or {}).get(FIRST_ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118  # it is no dict
                self.places.setdefault(name, []).append((first.get(name, 0), file))

    def all_below(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors whose names begin so, without that beginning."""
        found: dict[str, Tensor] = {}
        for name, parts in self.places.items():
            if name.startswith(prefix):
                rows = [file.get_tensor(name) for _, file in sorted(parts, key=lambda part: part[0])]
                found[name.removeprefix(prefix)] = torch.cat(rows) if rows[0].ndim else rows[0]
        return found

    def read(self, name: str, tensor: Tensor) -> None:
        """Fill the tensor, or this rank's rows of it."""
        if name not in self.places:
            raise CheckpointError(f"the checkpoint has no {name}: it was saved from another model")
        if tensor.ndim == 0:
            tensor.copy_(self.places[name][0][1].get_tensor(name))
            return
        start, local = 0, tensor
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            start = int(offset[0])
        found = 0
        for first, file in self.places[name]:
            part = file.get_slice(name)
            rows, *rest = part.get_shape()
            if rest != list(tensor.shape[1:]) or first + rows > tensor.shape[0]:
                raise CheckpointError(f"{name} is another shape in the checkpoint: it was saved from another model")
            low, high = max(start, first), min(start + len(local), first + rows)
            if low < high:
                local[low - start : high - start].copy_(part[low - first : high - first])
                found += high - low
        if found != len(local):
            raise CheckpointError(
                f"{name}: {found} of {len(local)} rows are in the checkpoint, which is damaged or of another model"
            )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state dict, tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[f"weights.{name}"] = tensor
    return found


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": tensor
        for name, parameter in _trained(module).items()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
