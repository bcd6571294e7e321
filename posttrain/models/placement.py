"""Where a network that does not train is kept: on the run's device, or in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Where = Literal["device", "offload", "cpu"]


class Kept:
    """`with kept() as network` gives it where it can be used; `device` says where that is.

    where: device (it stays there), offload (it waits in the host's memory and is copied over for each use), cpu (it computes
    where it waits).
    """

    def __init__(self, network: Any, where: Where, device: torch.device) -> None:
        self.device = torch.device("cpu") if where == "cpu" else device
        self.network = network.requires_grad_(False).eval().to("cpu" if where == "offload" else self.device)
        self.lent = where == "offload"
        if self.lent and device.type == "cuda":
            for tensor in _tensors(network):  # page-locked memory is copied twice as fast
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def __call__(self) -> Iterator[Any]:
        if not self.lent:
            yield self.network
            return
        homes = [(tensor, tensor.data) for tensor in _tensors(self.network)]
        try:
            for tensor, home in homes:
                tensor.data = _copied(home, self.device)
            yield self.network
        finally:
            for tensor, home in homes:
                tensor.data = home  # it has not changed: nothing to copy back


def _tensors(network: Any) -> list[torch.Tensor]:
    """Parameters and buffers, shared ones once."""
    return [*network.parameters(), *network.buffers()]


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
