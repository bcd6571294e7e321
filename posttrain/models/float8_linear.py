"""A linear module whose three products are torchao's float8 ones under autocast. Imported only where precision=fp8: torchao is
an extra, and takes a second to import.

    Y = X·Wᵀ,  ∂X = ∂Y·W,  ∂W = ∂Yᵀ·X,  each operand T as q(s·T) / s with s = max(float8) / max|T|

tensorwise: one s a tensor, E4M3 for X and W, E5M2 for ∂Y. rowwise: one s a row (of the operand as it stands in the product),
rounded down to a power of two, E4M3 for all three (arXiv:2209.05433; torchao/float8/config.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8.config import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args


class AutocastFloat8Linear(Float8Linear):
    """torchao's module, with two differences. Float8 is what autocast turns on, as it is for every other product in fewer bits:
    without it, or where `in_float8` is off (the start-up checks), this is the plain layer. And it reads autocast's dtype of
    the input's own device, where torchao asks for that of GPUs."""

    in_float8 = True

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if (
            not self.in_float8 or not torch.is_autocast_enabled(device) or not input.numel()
        ):  # an empty tensor has no largest magnitude
            return nn.functional.linear(input, self.weight, self.bias)
        input = input.to(torch.get_autocast_dtype(device))
        output: Tensor = matmul_with_hp_or_float8_args.apply(input, self.weight.t(), self.linear_mm_config, self.config)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def float8_config(recipe: str, emulate: bool) -> Any:
    """torchao's recipe. The number of tokens is padded to a multiple of 16, which the product ∂Yᵀ·X needs."""
    return replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)


def to_float8(module: nn.Linear, config: Any) -> nn.Module:
    """The module with the very same parameters."""
    converted: nn.Module = AutocastFloat8Linear.from_float(module, config)
    return converted.train(module.training)
