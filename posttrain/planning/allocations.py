"""Bytes of tensors that are alive, and the most there were at once: counted op by op, on any device alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CASTS = {torch.ops.aten._to_copy.default}


class Allocations(TorchDispatchMode):
    """`with Allocations(parameters) as seen` counts every storage that an op makes meanwhile, until it is freed.

    live, peak: bytes, beside what there was before. copies: of `live`, casts of the parameters to another dtype (autocast's).
    What a kernel takes and gives back within one op is not seen.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.live = self.peak = self.copies = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        before = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        is_copy = func in CASTS and args[0].untyped_storage()._cdata in self.parameters
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage(), is_copy)
        return result

    def restart(self) -> int:
        """Forget the peak so far; returns it."""
        peak, self.peak = self.peak, self.live
        return peak

    def _add(self, storage: Any, is_copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self.parameters or not size or storage.device.type == "meta":
            return

        def freed(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= size
                self.copies -= size if is_copy else 0

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.copies += size if is_copy else 0
        self.peak = max(self.peak, self.live)
