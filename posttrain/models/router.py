"""Load balance of a mixture of experts, sequence-wise (arXiv:2412.19437, eqs. 17-20).

    L_aux = Σ_sequences T_s · E Σ_e f_e m_e

f_e: share of the sequence's tokens sent to expert e (sums to k over e), m_e its mean router probability. Per sequence over
real tokens, weighted by length, because a product of batch means has no sum and count: it would change with the split into
micro-batches.

Which experts a token went to, and with what weights, is read off the routers as they run: some choose with a bias or by
groups of experts, and some score experts by sigmoid, so that neither can be told from the logits alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import Batch

EXPERT_LOAD = "expert_load/"

Scoring = Callable[[Tensor], Tensor]
"""Router logits [T, E] → probabilities [T, E], fp32."""


@dataclass
class Routing:
    """One layer's decisions: logits [R·L, E] with gradient; experts, weights [R·L, k] of those chosen, where told."""

    logits: Tensor
    experts: Tensor | None = None
    weights: Tensor | None = None


class Routers:
    """A network's router modules, each with where its output holds the logits; false where it is no mixture."""

    def __init__(self, backbone: nn.Module) -> None:
        self.modules = _find(backbone)
        self.scoring: Scoring | None = None

    def __bool__(self) -> bool:
        return bool(self.modules)

    @contextmanager
    def watch(self) -> Iterator[list[Routing]]:
        """What they decide meanwhile; recomputation in backward comes later and is not seen twice."""
        seen: list[Routing] = []

        def hook(index: int) -> Any:
            return lambda module, inputs, output: seen.append(_routing(output, index))

        handles = [module.register_forward_hook(hook(index)) for module, index in self.modules]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def balance(self, seen: list[Routing], batch: Batch, config: Any) -> Router:
        """The load balance of one forward."""
        if self.scoring is None:
            self.scoring = _scoring(seen[0])
        return Router.of(seen, batch, config, self.scoring)


def _find(backbone: nn.Module) -> list[tuple[nn.Module, int]]:
    """By what the library declares of its models; the inner one where it declares a router and what holds it (jetmoe)."""
    found: dict[nn.Module, int] = {}
    for model in backbone.modules():
        declared = getattr(model, "_can_record_outputs", None) if isinstance(model, PreTrainedModel) else None
        recorders: Any = (declared or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            kind: Any = recorder if isinstance(recorder, type) else recorder.target_class
            wanted = getattr(recorder, "layer_name", None) or ""
            modules: list[nn.Module] = [
                m for name, m in model.named_modules() if isinstance(m, kind) and wanted in name
            ]
            found.update({m: getattr(recorder, "index", 0) for m in modules})
    outer = {router for router in found if any(m in found for m in router.modules() if m is not router)}
    return [(router, index) for router, index in found.items() if router not in outer]


def _routing(output: Any, index: int) -> Routing:
    if isinstance(output, Tensor):
        return Routing(output.flatten(0, -2))
    logits = output[index].flatten(0, -2)
    rest = [t.flatten(0, -2) for t in output if isinstance(t, Tensor) and t is not output[index] and t.dim() > 1]
    experts = next((t for t in rest if not t.is_floating_point() and len(t) == len(logits)), None)
    same = [t for t in rest if experts is not None and t.is_floating_point() and t.shape == experts.shape]
    return Routing(logits, experts, same[0].detach() if same else None)


@dataclass
class Router:
    """balance: mean over layers of Σ_s T_s·E·Σ f·m, scalar; load: [E] tokens sent to each expert, mean over layers.

    A sequence is a response with its prompt: in the shared layout a prompt counts in each of its responses' sequences.
    """

    balance: Tensor
    load: Tensor
    tokens: int

    @classmethod
    def of(cls, routings: list[Routing], batch: Batch, config: Any, scoring: Scoring | None = None) -> Router:
        """From each layer's routing; scoring: logits to probabilities, softmax unless given."""
        scoring = scoring or SCORINGS[0]
        k: Any = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", 2)
        real, owner = batch.sequences()
        sequences = len(batch.group)
        lengths = torch.zeros(sequences, device=owner.device).index_add_(
            0, owner, torch.ones_like(owner, dtype=torch.float32)
        )
        balance = torch.zeros((), device=owner.device)
        loads = []
        for routing in routings:
            probabilities = scoring(routing.logits.float())[real]  # [T, E]
            experts = probabilities.shape[-1]
            chosen = routing.experts[real] if routing.experts is not None else probabilities.topk(k, -1).indices
            sent = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
            zeros = probabilities.new_zeros(sequences, experts)
            f = zeros.index_add(0, owner, sent) / lengths[:, None]
            m = zeros.index_add(0, owner, probabilities) / lengths[:, None]
            balance = balance + (lengths * experts * (f * m).sum(-1)).sum()
            loads.append(sent.sum(0).detach())
        layers, load = len(routings), torch.stack(loads).sum(0)
        return cls(balance * batch.weight / layers, load * batch.weight / layers, batch.sequence_tokens)

    def stats(self) -> dict[str, tuple[Tensor, float]]:
        """For the log: the loss per token, and each expert's share f_e; the busiest is known only once all are summed."""
        tokens = float(self.tokens)
        loads = {f"{EXPERT_LOAD}{e}": (load, tokens) for e, load in enumerate(self.load.unbind())}
        return {"aux_loss": (self.balance.detach(), tokens), **loads}


def _scoring(routing: Routing) -> Scoring:
    """The scoring in whose ratios the layer weighed its chosen experts; softmax where none fits."""
    logits = routing.logits.detach().float()
    if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-2).all()):
        return _identity  # some hand out their probabilities under this name
    if routing.weights is None or routing.experts is None or routing.experts.shape[-1] < 2:
        return SCORINGS[0]
    given = _share(routing.weights.float())
    for scoring in SCORINGS:
        if float((_share(scoring(logits).gather(-1, routing.experts)) - given).abs().mean()) < 2e-3:
            return scoring
    return SCORINGS[0]


def _share(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)


def _identity(probabilities: Tensor) -> Tensor:
    return probabilities


SCORINGS: tuple[Scoring, ...] = (
    lambda logits: logits.softmax(-1),
    lambda logits: _share(logits.sigmoid()),  # arXiv:2412.19437, eqs. 15, 18
    lambda logits: _share(nn.functional.softplus(logits).sqrt()),
)
