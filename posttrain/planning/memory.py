"""Bytes on one device at each moment of a run: arithmetic on what the model holds and what one layer was measured to need.

    at rest    parameters, frozen companions, optimizer state
    forward    + gradients of earlier micro-batches + what all layers keep for backward + the loss's own
    backward   + gradients + the layer that is being gone through
    update     + gradients
    sampling   + the answers' keys and values
    start      ZeRO 3: weights still whole, no optimizer yet

Gradient checkpointing keeps of each layer its output; while backward goes through a layer, that one is there in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.zero import BUCKET

Moment = dict[str, int]
"""What: bytes."""

AVERAGES_BYTES = {
    "adamw": 8.0, "paged_adamw": 8.0, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256, "adamw_bf16": 4.0,
}  # fmt: skip
"""AdamW's two averages, bytes a trained parameter: fp32, 8 bits and an fp32 scale for each 256, or bf16."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits, an 8-bit scale for each 64, an fp32 scale for each 256 of these (arXiv:2305.14314)."""


WHOLE = ("reward model",)
"""Of the models beside the trained one: whole on every rank, which each score their own answers with it."""

ZERO_BUCKETS = 4 * BUCKET
"""Where DeepSpeed puts gradients together before they are added up over the ranks."""


@dataclass(frozen=True)
class Held:
    """A network at rest. parameters: bytes; trained: numbers that train, `beside` of them outside the layers; layer: numbers of
    its largest layer, layer_bytes: as it is held, layer_trained: of those that train; outside: numbers outside the layers,
    outside_bytes: as they are held; numbers: all."""

    parameters: int
    trained: int
    beside: int = 0
    layer: int = 0
    layer_bytes: int = 0
    layer_trained: int = 0
    outside: int = 0
    outside_bytes: int = 0
    numbers: int = 0


@dataclass(frozen=True)
class LayerBytes:
    """One layer of `count` alike, for one micro-batch. kept: for backward, its output with it; copies: of its weights, by
    autocast, likewise kept; output: alone; forward, backward: the most beside what it keeps."""

    count: int
    kept: int
    copies: int
    output: int
    forward: int
    backward: int


@dataclass(frozen=True)
class OutsideBytes:
    """Embeddings, output layer and loss, for one micro-batch. kept: once the loss is known; forward: the most until then; head:
    the most until backward reaches the layers; pending: what then waits; end: the most after the layers."""

    kept: int
    forward: int
    head: int
    pending: int
    end: int


@dataclass(frozen=True)
class Sharing:
    """How much of each a rank holds; others: of a reference. gathers: whole layers come together while they compute. host:
    gradients and optimizer are off the device, host_weights: weights too. always: gradients stay allocated between steps. zero:
    DeepSpeed's stage, which keeps an fp32 copy of its part of the weights; stage 3 begins with whole ones. twice: what is
    gathered for a whole pass is there twice, for gloo lets go late of the buffer that it came in."""

    parameters: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    others: float = 1.0
    gathers: bool = False
    host: bool = False
    host_weights: bool = False
    always: bool = False
    zero: int = 0
    twice: bool = False


def sharing(name: str, world: int, zero_stage: int, host: bool = False, gloo: bool = False) -> Sharing:
    """distribution=name over `world` ranks, which are joined by gloo (CPUs) or NCCL."""
    part = 1 / world
    if name == "fsdp":
        return Sharing(part, part, part, others=part, gathers=True, host=host, host_weights=host, twice=gloo)
    if name == "deepspeed":
        in_parts = zero_stage == 3
        return Sharing(part if in_parts else 1.0, part, part, gathers=in_parts, host=host, zero=zero_stage)
    return Sharing(always=name == "ddp" and world > 1)


@dataclass(frozen=True)
class Run:
    """What the moments are made of. frozen: key → bytes of models beside the trained one. compute: bytes of a number while
    computing; trained: of a weight that trains, and of its gradient. accumulates: more than one micro-batch a step. optimizer:
    bytes of its state a trained parameter. cache: bytes of the answers' keys and values, and `sampling` what writing needs
    beside them; scoring: the most of a forward pass alone."""

    held: Held
    share: Sharing
    optimizer: float
    layers: list[LayerBytes]
    outside: OutsideBytes
    accumulates: bool
    checkpointing: bool
    compute: int = 4
    trained: int = 4
    frozen: tuple[tuple[str, int], ...] = ()
    scoring: int = 0
    cache: int = 0
    sampling: int = 0

    def moments(self) -> dict[str, Moment]:
        """forward, backward, update, evaluation or sampling where they are measured, and ZeRO 3's start."""
        grads = self._gradients
        found = {
            "forward": self._at(grads if self.accumulates or self.share.always else 0, self._forward()),
            "backward": self._backward(),
            "update": self._at(grads, {}),
        }
        between = grads if self.share.always else 0
        if self.scoring:
            found["evaluation"] = self._at(between, {"output layer, loss": self.scoring, **self._gathered})
        if self.cache:
            written = {"answers' cache": self.cache, "writing": self.sampling}
            found["sampling"] = self._at(between, written | self._gathered_sampling)
        if self.share.zero == 3:
            found["start"] = {"parameters": self.held.parameters, "output layer, loss": self.scoring}
        return found

    @property
    def _gradients(self) -> int:
        return 0 if self.share.host else round(self.trained * self.held.trained * self.share.gradients)

    @property
    def _gathered(self) -> Moment:
        """Whole weights: the layer that computes and the next, in the compute dtype or in fewer bytes where they are held so,
        and what is outside, as it is held (sharding.py); ZeRO's as they are held, and as much ahead as a bucket holds."""
        held = self.held
        if self.share.zero:
            layer = max(
                held.layer_bytes, min(ZERO_BUCKETS, held.parameters - held.outside_bytes - held.layer_bytes) / 2
            )
        else:
            layer = min(held.layer_bytes, held.layer * self.compute)
        outside = held.outside_bytes * (2 if self.share.twice else 1)
        return {"gathered weights": round(2 * layer) + outside if self.share.gathers else 0}

    @property
    def _gathered_backward(self) -> Moment:
        """And whole gradients, of a layer also in the fp32 in which they are added up over the ranks."""
        gradients = (self.compute + 4) * self.held.layer_trained + 4 * self.held.beside if self.share.gathers else 0
        return {"gathered weights": self._gathered["gathered weights"] + gradients}

    @property
    def _gathered_sampling(self) -> Moment:
        """All weights, in the compute dtype (ZeRO's as they are held): ranks write different numbers of tokens."""
        held = self.held.parameters
        whole = held if self.share.zero else min(held, self.held.numbers * self.compute)
        return {"gathered weights": whole if self.share.gathers else 0}

    def _at(self, gradients: int, more: Moment) -> Moment:
        part = self.share
        state = self.optimizer + (4 if part.zero else 0)
        return {
            "parameters": 0 if part.host_weights else round(self.held.parameters * part.parameters),
            **{name: size if name in WHOLE else round(size * part.others) for name, size in self.frozen},
            "gradients": gradients + (ZERO_BUCKETS if part.zero else 0),
            "optimizer": 0 if part.host else round(state * self.held.trained * part.optimizer),
            **more,
        }

    @property
    def _copies(self) -> int:
        return 0 if self.share.gathers else sum(each.count * each.copies for each in self.layers)

    @property
    def _kept(self) -> int:
        return sum(each.count * (each.output if self.checkpointing else each.kept) for each in self.layers)

    def _forward(self) -> Moment:
        """Autocast's copies stay until the forward pass is over, recomputed layers or not."""
        inside = max((each.forward for each in self.layers), default=0)
        rest = max(self.outside.forward, inside)
        copies = {"copies of weights": self._copies}
        return {"activations": self._kept, **copies, "output layer, loss": rest, **self._gathered}

    def _backward(self) -> Moment:
        """The output layer first, then layer after layer, the embeddings last."""
        grads, copies = self._gradients, 0 if self.checkpointing else self._copies
        there = grads if self.accumulates or self.share.always else 0
        again = max((each.kept + each.copies for each in self.layers), default=0) if self.checkpointing else 0
        within = max((each.backward for each in self.layers), default=0) + again
        head = {"activations": self._kept, "copies of weights": copies, "output layer, loss": self.outside.head}
        layers = {
            "activations": self._kept + within, "copies of weights": copies, "output layer, loss": self.outside.pending,
        }  # fmt: skip
        # without earlier gradients those of what is outside the layers are among `end` already
        own = 0 if there else self.trained * self.held.beside
        last = {"activations": 0, "copies of weights": 0, "output layer, loss": self.outside.end}
        choices = [self._at(there, head | self._gathered_backward), self._at(there, layers | self._gathered_backward)]
        choices.append(self._at(max(0, grads - own), last | self._gathered_backward))
        return max(choices, key=total)


def total(moment: Moment) -> int:
    return sum(moment.values())


def peak(moments: dict[str, Moment]) -> tuple[str, int]:
    """The moment with the most, and how much."""
    name = max(moments, key=lambda each: total(moments[each]))
    return name, total(moments[name])


def most(*runs: dict[str, Moment]) -> dict[str, Moment]:
    """Of each moment the one with more in it."""
    return {name: max((run[name] for run in runs), key=total) for name in runs[0]}


def cache_bytes(tokens: int, each_layer: Iterable[tuple[int, float]]) -> int:
    """Keys and values of so many tokens: 2·layers·kv_heads·head_dim·bytes·tokens. each_layer: (layers alike, bytes a token); of
    one layer the old and the grown cache are there together."""
    sizes = list(each_layer)
    return round(tokens * (sum(count * size for count, size in sizes) + max((size for _, size in sizes), default=0)))
