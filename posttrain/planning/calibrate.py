"""One layer and the output layer run on a real micro-batch: the bytes they keep, and the seconds they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.data.batches import Batch
from posttrain.models.networks import Networks
from posttrain.optim import build_optimizer
from posttrain.planning.allocations import Allocations
from posttrain.planning.memory import LayerBytes, OutsideBytes
from posttrain.planning.skeleton import Kind, Skeleton, boundary, calls
from posttrain.stages.base import Asked, Stage

if TYPE_CHECKING:
    from posttrain.config import OptimConfig
    from posttrain.runtime import Runtime

SECONDS, REPEATS = 0.5, (2, 20)
"""How long something is measured again and again, and how often at least and at most. A first time that is shorter than this
warms up alone."""


@dataclass(frozen=True)
class Seconds:
    """value: the median; spread: half of what lies between the quickest and the slowest."""

    value: float = 0.0
    spread: float = 0.0

    def times(self, factor: float) -> Seconds:
        return Seconds(self.value * factor, self.spread * factor)

    def plus(self, *others: Seconds) -> Seconds:
        """Of one thing after another; deviations that come together add up."""
        everything = (self, *others)
        return Seconds(sum(s.value for s in everything), sum(s.spread for s in everything))


@dataclass
class MicroSeconds:
    """Of one micro-batch of `tokens`, padding included: what all layers take, and what is outside them, there and back."""

    tokens: int
    forward: Seconds = field(default_factory=Seconds)
    backward: Seconds = field(default_factory=Seconds)
    outside: Seconds = field(default_factory=Seconds)


class Wrapped(nn.Module):
    """The module under the run's autocast, as the trainer calls it."""

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.module, self.runtime = module, runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.runtime.autocast():
            return self.module(*args, **kwargs)


class Calibration:
    """Runs a stage's own loss and score on a Skeleton."""

    def __init__(self, skeleton: Skeleton, stage: Stage, runtime: Runtime) -> None:
        self.skeleton, self.stage, self.runtime = skeleton, stage, runtime
        self.networks = Networks(Wrapped(skeleton.module, runtime), skeleton.module, None)
        self.networks.train(True)

    def bytes_of(self, batch: Batch, accumulates: bool) -> tuple[list[LayerBytes], OutsideBytes]:
        """What each kind of layer, and the rest, keep and need for this micro-batch. accumulates: gradients of an earlier one
        lie there already."""
        batch = batch.to(self.runtime.device)
        layers = [self._layer_bytes(kind, batch, accumulates) for kind in self.skeleton.kinds]
        return layers, self._outside_bytes(batch, accumulates)  # last: by then it is known what a layer hands on

    def seconds_of(self, batch: Batch) -> MicroSeconds:
        """What this micro-batch takes."""
        batch = batch.to(self.runtime.device)
        found = MicroSeconds(batch.input_ids.numel())
        found.outside = self._timed(lambda: self._loss(batch).backward())
        for kind in self.skeleton.kinds:
            with self.skeleton.real(kind):
                layer = self._layer(kind, batch)
                there = self._timed(layer)
                both = self._timed(lambda layer=layer: _back(layer()))  # type: ignore[misc]
            found.forward = found.forward.plus(there.times(kind.count))
            back = Seconds(max(0.0, both.value - there.value), both.spread)
            found.backward = found.backward.plus(back.times(kind.count))
        self._forget()
        return found

    def scoring_seconds(self, batch: Batch) -> Seconds:
        """What is outside the layers, in a forward pass of an evaluation."""
        batch = batch.to(self.runtime.device)
        return self._timed(lambda: self._score(batch))

    def update_seconds(self, optim: OptimConfig, trained: int) -> Seconds:
        """Clipping and the optimizer's step on one layer's parameters, for as many as train."""
        kind = max(self.skeleton.kinds, key=lambda kind: kind.count)
        with self.skeleton.real(kind):
            own = [p for p in kind.layer.parameters() if p.requires_grad]
            if not own:
                return Seconds()
            optimizer = build_optimizer(kind.layer, optim)
            for parameter in own:
                parameter.grad = torch.zeros_like(parameter)

            def update() -> None:
                nn.utils.clip_grad_norm_(own, optim.max_grad_norm)
                optimizer.step()

            taken = self._timed(update)
        self._forget()
        return taken.times(trained / sum(p.numel() for p in own))

    def _outside_bytes(self, batch: Batch, accumulates: bool) -> OutsideBytes:
        if accumulates:
            self._loss(batch).backward()
        reached: list[int] = []
        first = self.skeleton.layers[id(self.skeleton.module)][0]
        with Allocations(self.skeleton.module.parameters()) as seen:
            with boundary(first, lambda: reached.extend((seen.restart(), seen.live))):
                loss = self._loss(batch)
            kept, forward = seen.live, seen.restart()
            loss.backward()
            end = seen.peak
        head, pending = reached[:2] if reached else (end, 0)
        self._forget()
        return OutsideBytes(kept, forward, head, pending, end)

    def scoring_bytes(self, batch: Batch) -> int:
        """The most that a forward pass without a backward needs."""
        batch = batch.to(self.runtime.device)
        with Allocations(self.skeleton.module.parameters()) as seen:
            self._score(batch)
        return seen.peak

    def _layer_bytes(self, kind: Kind, batch: Batch, accumulates: bool) -> LayerBytes:
        with self.skeleton.real(kind):
            layer = self._layer(kind, batch)
            if accumulates:
                _back(layer())
            with Allocations(self.skeleton.module.parameters()) as seen:
                states = layer()
                kept, copies = seen.live, seen.copies
                forward = seen.restart()
                _back(states)
                backward = seen.peak
            output = states.untyped_storage().nbytes()
        self._forget()
        return LayerBytes(kind.count, kept - copies, copies, output, forward - kept, backward - kept)

    def _layer(self, kind: Kind, batch: Batch) -> Callable[[], Tensor]:
        """The layer called as the network calls it with this batch."""
        with calls(kind.layer) as seen, torch.no_grad(), self.runtime.autocast():
            kind.decoder.hidden(batch)
        args, kwargs = seen[0]
        states = args[0] if args else kwargs["hidden_states"]
        states = states.detach().requires_grad_()
        args, kwargs = ((states, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": states})

        def run() -> Tensor:
            with self.runtime.autocast():
                output = kind.layer(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return run

    def _loss(self, batch: Batch) -> Tensor:
        weights = self.stage.weights()
        terms = self.stage.loss(self.networks, batch).terms
        return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def _score(self, batch: Batch) -> None:
        self.networks.train(False)
        if self.stage.answer_tokens:
            self.networks.policy(batch, statistics=True, entropy=True)  # as what was sampled is scored
        else:
            self.stage.score(self.networks, batch, Asked(bins=15))
        self.networks.train(True)

    def _timed(self, function: Callable[[], Any]) -> Seconds:
        first, taken = self._once(function), list[float]()
        if first > SECONDS:
            taken.append(first)
        while len(taken) < REPEATS[0] or (sum(taken) < SECONDS and len(taken) < REPEATS[1]):
            taken.append(self._once(function))
        taken.sort()
        return Seconds(taken[len(taken) // 2], (taken[-1] - taken[0]) / 2)

    def _once(self, function: Callable[[], Any]) -> float:
        synchronize(self.runtime.device)
        began = time.perf_counter()
        function()
        synchronize(self.runtime.device)
        return time.perf_counter() - began

    def _forget(self) -> None:
        for parameter in self.skeleton.module.parameters():
            parameter.grad = None


def _back(states: Tensor) -> None:
    states.backward(torch.ones_like(states))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
