"""AdamW over bf16 weights without fp32 masters: every step is computed in fp32 and rounded to bf16 at random, in proportion.

A weight w has bf16 neighbours 2^-8 of it apart, so that rounding to nearest loses any update below 2^-9·|w|. Stochastic
rounding goes up with the probability of what is left over, and keeps it in expectation: E[round(x)] = x (arXiv:2010.06192;
the arithmetic on bits is torchao.optim's). Both moments are rounded so too, a departure from torchao: a second moment that
decays by a thousandth a step would else never decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 → bf16, up or down in magnitude: a float's lower 16 bits are how far it is from the bf16 number below."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))  # the carry rounds up
    return bits.view(torch.float32).bfloat16()


class AdamWBF16(torch.optim.Optimizer):
    """torch.optim.AdamW's step; parameters in bf16 keep weights and moments in bf16, those in fp32 (a value head) in fp32.

    The random numbers of a step are made from the seed and its number: the same after resuming, and the same on every rank,
    whose weights must stay alike. Of sharded parameters each rank rounds its own part, by numbers of its own.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it is never given one
        assert closure is None
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                state["step"] += 1
                device = parameter.device
                if device not in generators:
                    generators[device] = self._generator(int(state["step"]), parameter)
                _update(parameter, state, group, generators[device])

    def _generator(self, step: int, parameter: Tensor) -> torch.Generator:
        """step: of the first parameter that has a gradient; the later ones follow in the same stream."""
        part = torch.distributed.get_rank() if isinstance(parameter, DTensor) else 0
        mixed = ((self.seed * 1_000_003 + step) * 1_000_003 + part) % 2**63
        return torch.Generator(parameter.device).manual_seed(mixed)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: torch.Generator) -> None:
    """w ← w - lr·(m̂/(√v̂ + eps) + wd·w), in fp32."""
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    weight, first, second = (_local(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
    assert parameter.grad is not None
    grad, w = _local(parameter.grad).float(), weight.float()
    m = first.float().lerp_(grad, 1 - beta1)
    v = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    new = (w * (1 - group["lr"] * group["weight_decay"])).addcdiv_(
        m, denominator, value=-group["lr"] / (1 - beta1**step)
    )
    for kept, exact in ((first, m), (second, v), (weight, new)):
        kept.copy_(stochastic_round(exact, generator) if kept.dtype == torch.bfloat16 else exact)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, else the tensor itself; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
