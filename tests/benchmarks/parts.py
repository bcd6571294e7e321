"""Where the time of our own optimizer steps goes: a timer around each part of the loop, the first step left out.

Meant for a processor, where a call returns when its work is done.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STEP = "posttrain.train:Trainer._update"
DATA = "posttrain.data.loader:compose"
PARTS = {
    "backbone, forward": ["posttrain.models.policy:Policy.hidden"],
    "output layer, forward": [
        "posttrain.models.policy:weighted_nll",
        "posttrain.models.policy:token_logprobs",
        "posttrain.models.policy:token_statistics",
    ],
    "backward": ["posttrain.runtime:Runtime.backward"],
    "clipping": ["posttrain.runtime:Runtime.clip"],
    "optimizer step": ["torch.optim:AdamW.step"],
}


class Timers:
    """Seconds in each part, inside optimizer steps from the second on."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*PARTS, "data"], 0.0)
        self.steps, self.whole, self.inside = 0, 0.0, False

    def shares(self) -> dict[str, float]:
        """Each part's share of the time; what no timer covers is `the rest`."""
        whole = self.whole + self.seconds["data"]
        found = {name: seconds / whole for name, seconds in self.seconds.items()}
        return {**found, "the rest": 1 - sum(found.values())} if whole else {}

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self.steps and (self.inside or name == "data"):
                    self.seconds[name] += time.perf_counter() - began

        return timed

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, self.inside = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.whole += (time.perf_counter() - began) if self.steps else 0.0
                self.steps, self.inside = self.steps + 1, False

        return timed


@contextmanager
def timing() -> Iterator[Timers]:
    """Timers around the loop's parts for the length of this block."""
    timers, undo = Timers(), []
    around = [(place, functools.partial(timers.part, name)) for name, places in PARTS.items() for place in places]
    for place, wrap in [*around, (DATA, functools.partial(timers.part, "data")), (STEP, timers.step)]:
        owner, name = _owner(place)
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield timers
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)


def _owner(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    return owner, name
