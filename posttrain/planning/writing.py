"""Answers written with one layer of each kind: seconds a token, and the bytes of what is kept of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from posttrain.models.policy import Policy
from posttrain.planning.allocations import Allocations
from posttrain.planning.calibrate import Calibration, Seconds, synchronize
from posttrain.planning.memory import cache_bytes
from posttrain.planning.skeleton import layers_of
from posttrain.rollout import BATCH_TOKENS, buckets, generate
from posttrain.sampling import Sampling

TOKENS = 4
"""Written to measure."""

NO_TOKEN = -1
"""Ends no answer."""


@dataclass(frozen=True)
class Written:
    """seconds: for all prompts, every answer as long as it may be. cache: the most bytes of keys and values at once; beside:
    what writing needs besides. tokens: of all answers."""

    seconds: Seconds
    cache: int
    beside: int
    tokens: int


class Clock:
    """Seconds of every call: of the whole network, and of the one layer of each kind; cache: the bytes of it that one token
    takes in each kind's layer."""

    def __init__(self, calibration: Calibration) -> None:
        skeleton = calibration.skeleton
        self.device, self.module = skeleton.device, skeleton.module
        self.kinds = [kind for kind in skeleton.kinds if kind.decoder is skeleton.module]
        self.network: list[float] = []
        self.layers: list[list[float]] = [[] for _ in self.kinds]
        self.cache: list[tuple[int, float]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block calls are timed."""
        hooks = self._around(self.module.network, self.network, self._look)
        for kind, seconds in zip(self.kinds, self.layers, strict=True):
            hooks += self._around(kind.layer, seconds)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _around(self, module: nn.Module, into: list[float], look: Callable[[Any], None] | None = None) -> list[Any]:
        def before(*_: Any) -> None:
            synchronize(self.device)
            into.append(-time.perf_counter())

        def after(_: Any, __: Any, output: Any) -> None:
            synchronize(self.device)
            into[-1] += time.perf_counter()
            if look:
                look(output)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _look(self, output: Any) -> None:
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])
        stack = list(layers_of(self.module))
        self.cache = []
        for kind in self.kinds:
            at = stack.index(kind.layer)
            keys, values = (getattr(layers[at], name, None) for name in ("keys", "values")) if layers else (None, None)
            if keys is not None and values is not None and keys.numel():
                self.cache.append((kind.count, (keys.nbytes + values.nbytes) / (keys.shape[0] * keys.shape[-2])))


def write(calibration: Calibration, prompts: list[list[int]], samples: int, room: int, sampling: Sampling) -> Written:
    """Measured in the largest batch, halfway through the answers."""
    parts = [[prompts[i] for i in part] for part in buckets(prompts, room, BATCH_TOKENS, samples)]
    first = max(parts, key=len)
    halfway = [prompt + prompt[:1] * (room // 2) for prompt in first]
    with Allocations(calibration.skeleton.module.parameters()) as seen:  # and warms up
        _run(calibration, halfway, samples, sampling, Clock(calibration))
    clock = Clock(calibration)
    whole = _run(calibration, halfway, samples, sampling, clock)
    shares = [len(part) / len(first) for part in parts]
    longest = max(len(part) * samples * (max(map(len, part)) + room) for part in parts)
    there = len(first) * samples * (max(map(len, halfway)) + TOKENS)
    beside = seen.peak - round(there * sum(size for _, size in clock.cache))
    seconds = _seconds(clock, whole, room).times(sum(shares))
    return Written(seconds, cache_bytes(longest, clock.cache), max(0, beside), len(prompts) * samples * room)


def _seconds(clock: Clock, whole: float, room: int) -> Seconds:
    """Of one batch: the prompts read, then `room` tokens; the first call looks at what kind of cache there is."""
    calls = list(clock.network)
    for kind, each in zip(clock.kinds, clock.layers, strict=True):
        calls = [call + (kind.count - 1) * layer for call, layer in zip(calls, each, strict=True)]
    prefill, steps = calls[1], sorted(calls[2:])
    picking = max(0.0, whole - sum(clock.network)) / TOKENS
    return Seconds(prefill + room * (steps[len(steps) // 2] + picking), room * (steps[-1] - steps[0]) / 2)


def _run(calibration: Calibration, prompts: list[list[int]], samples: int, sampling: Sampling, clock: Clock) -> float:
    """Seconds of writing TOKENS to each."""
    runtime, policy = calibration.runtime, calibration.skeleton.module
    assert isinstance(policy, Policy)
    with ExitStack() as opened:
        for kind in clock.kinds:
            opened.enter_context(calibration.skeleton.real(kind))
        opened.enter_context(runtime.autocast())
        opened.enter_context(clock.running())
        began = time.perf_counter()
        generate(policy, prompts, {NO_TOKEN}, 0, TOKENS, device=runtime.device, sampling=sampling, samples=samples)
        synchronize(runtime.device)
        return time.perf_counter() - began
