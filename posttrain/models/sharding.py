"""A network whose weights lie in parts on the ranks: torch's fully_shard (FSDP2), applied to the bare module in place.

Each decoder layer, and an embedding that is not tied, is gathered for its own forward and backward, in the run's precision (an
adapted layer as it is held: its base in 16 bits, its adapter in fp32); what is left (norm, output layer, tied embedding, heads)
for the whole pass, in fp32: so residuals, norms' sums, log-probs and the gradient of the output layer are as precise as on one
process. Gradients are reduced in fp32.

A sharded module's weights can be read inside its `forward` and the methods of READERS alone, or under `gathered`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder

READERS = ("read", "own_logits", "pooled")
"""Methods of a Decoder, besides forward, that are called from outside it."""


def shard(module: Decoder, mesh: DeviceMesh, compute: torch.dtype, offload: bool, full: bool) -> None:
    """Leave each rank its part of every weight, on the mesh's device, or with `offload` in host memory.

    full: every rank has the weights; else rank 0 alone, and the others have the shapes (on the meta device).
    """
    half = compute if compute != torch.float32 else None
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    _check_alike(module)
    values = None if full else _values(module, mesh)
    policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    low = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for layer in layers_of(module):
        # under an adapter the base is in 16 bits already, and what trains is small: DoRA's magnitudes would round away
        adapted = any(not parameter.requires_grad for parameter in layer.parameters())
        fully_shard(layer, mesh=mesh, mp_policy=exact if adapted else low, offload_policy=policy)
    if (embedding := _own_embedding(module)) is not None:
        wide = MixedPrecisionPolicy(half, torch.float32, output_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(embedding, mesh=mesh, mp_policy=wide, offload_policy=policy)
    if isinstance(head := getattr(module, "critic", None), nn.Linear):  # fp32 beside weights that may be bf16
        fully_shard(head, mesh=mesh, mp_policy=exact, offload_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=exact, offload_policy=policy)
    if values is not None:
        _spread(module, values, mesh, torch.device("cpu") if offload else device)
    root: Any = module
    root.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank was sent to
    module.gathered_in = compute
    _autocast(module, device, half)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of every stack in it: the items of module lists that are in no other list."""
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return [layer for found in outer for layer in found if any(True for _ in layer.parameters())]


def is_sharded(module: Any) -> bool:
    """Whether its weights lie in parts on the ranks."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Every weight whole on every rank, in the precision it computes in (ZeRO 3's as it is held): within this block ranks may do
    different numbers of forward passes, as in generation. Every rank must come here. Nothing happens where nothing is sharded."""
    theirs = getattr(module, "gather_all", None)
    if theirs is not None:
        with theirs():
            yield
        return
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    inner = [m for m in parts if m is not module]
    if is_sharded(module):
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]  # a layer that comes first would be the root
    try:
        for part in inner:
            part.set_reshard_after_forward(False, recurse=False)
        for part in parts:
            part.unshard()
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def numbers(parameter: Tensor) -> int:
    """Of the whole parameter, where this rank has a part (ZeRO 3 keeps its size beside it)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all ranks' parts where it lies in parts; every rank must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)  # from host memory, where it was offloaded
    found: Tensor = there.full_tensor()
    return found


@torch.no_grad()
def whole_state(module: nn.Module, keep: bool, trained_alone: bool = False) -> dict[str, Tensor]:
    """Name → whole tensor in host memory, tied weights once; empty where not `keep`. Every rank must ask.

    trained_alone: leave out frozen weights (a quantised base could not be put together from its bytes alone).
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or (trained_alone and not tensor.requires_grad):
            continue
        if id(tensor) not in seen:
            full = whole(tensor.detach())
            seen[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor that every rank has, laid out as `model` is."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    home = model.to_local().device
    placed = distribute_tensor(
        tensor.to(model.device_mesh.device_type), model.device_mesh, model.placements, src_data_rank=None
    )
    return placed.to(home)


def reshard(module: nn.Module) -> None:
    """Give up weights that are gathered still: before they are changed."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _check_alike(module: nn.Module) -> None:
    """Ranks whose weights differ in kind would wait for each other, or read each other's bytes: told before."""
    mine = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in module.named_parameters()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip_longest(theirs, everyone[0])
            here, there = next((a, b) for a, b in pairs if a != b)
            raise ModelError(
                f"distribution=fsdp: rank {rank} has other weights than rank 0 ({here} there, {there} on rank 0): this model's "
                "shape does not tell what its files hold; use distribution=ddp"
            )


def _values(module: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    return dict(module.state_dict()) if mesh.get_local_rank() == 0 else {}


@torch.no_grad()
def _spread(module: nn.Module, values: dict[str, Tensor], mesh: DeviceMesh, home: torch.device) -> None:
    """Rank 0's weights, one after another, to the ranks they belong to; and its buffers to all."""
    if mesh.get_local_rank() != 0:
        module.to_empty(device=home)
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        full = values[name] if values else torch.empty(parameter.shape, dtype=parameter.dtype)
        part = distribute_tensor(full.to(mesh.device_type), mesh, parameter.placements)
        parameter.to_local().copy_(part.to_local())
    for buffer in module.buffers():
        there = buffer.to(mesh.device_type)
        dist.broadcast(there, 0)
        buffer.copy_(there)


def _own_embedding(module: Decoder) -> nn.Module | None:
    """The input embedding, where it is a weight of its own that trains or not as a whole."""
    network: Any = module.network
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return None if tied or any(embedding is m for layer in layers_of(module) for m in layer.modules()) else embedding


def _autocast(module: nn.Module, device: torch.device, half: torch.dtype | None) -> None:
    """The module's own forward and readers under autocast, and readers gathering weights as forward does."""
    for name in ("forward", *(n for n in READERS if hasattr(module, n))):
        setattr(module, name, _in_precision(getattr(module, name), device, half))
        if name != "forward":
            register_fsdp_forward_method(module, name)


def _in_precision(method: Any, device: torch.device, half: torch.dtype | None) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, half, enabled=half is not None):
            return method(*args, **kwargs)

    return wrapped
