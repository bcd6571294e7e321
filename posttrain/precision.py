"""What a precision computes in, the loss scale that fp16 needs, and what the environment must not say otherwise.

fp16, bf16 and fp8 keep fp32 master weights: products run under autocast, norms, softmax, losses and log-probs in fp32.
fp8 is bf16 autocast whose linear modules multiply in float8 (models/float8.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.errors import ConfigError

COMPUTE = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16,
}  # fmt: skip
LAUNCHER = {"fp32": "no", "tf32": "no", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}
"""What Accelerate calls it."""

START_SCALE = 2.0**16
GROWTH_STEPS = 2000
FLOOR_SCALE = 1.0
"""torch.amp's defaults, and DeepSpeed's smallest scale (min_loss_scale): where gradients overflow even so, they overflow by
themselves, and no scale helps."""


class LossScaler:
    """Dynamic loss scaling (arXiv:1710.03740, sections 3.2 and 5): gradients below fp16's 2^-24 would be rounded to zero, so
    the loss is multiplied before backward and the gradients divided after it. A step whose gradients overflowed updates
    nothing and halves the scale; GROWTH_STEPS good ones in a row double it.

    Whether they did is told by the global gradient norm, which all ranks share, so that all skip together.
    """

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type, init_scale=START_SCALE, growth_interval=GROWTH_STEPS)

    @property
    def value(self) -> float:
        return float(self._scaler.get_scale())

    @property
    def is_at_floor(self) -> bool:
        return self.value <= FLOOR_SCALE

    def scale(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, once after the step's last backward."""
        self._scaler.unscale_(optimizer)

    def settle(self, finite: bool) -> None:
        """The scale of the next step. finite: the global norm of this one's unscaled gradients."""
        if finite:
            self._scaler.update()
            return
        self._scaler.update(max(FLOOR_SCALE, self.value * self._scaler.get_backoff_factor()))
        self.load(self.state() | {"_growth_tracker": 0})

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(self._scaler.state_dict())

    def load(self, state: Mapping[str, float]) -> None:
        """Scale and count of good steps, where a checkpoint had them."""
        if state:
            self._scaler.load_state_dict(dict(state))


def check_environment(precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """What the launcher or the environment says must not contradict the config; "no" is what a launcher says unasked.

    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some containers set, is only torch's default: the run sets it by its precision.
    """
    said = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ("no", LAUNCHER[precision]):
        instead = f", or set precision={said}" if said in LAUNCHER else ""
        raise ConfigError(
            f"precision={precision}, but the launcher or environment says ACCELERATE_MIXED_PRECISION={said}; "
            f"unset it (or its accelerate config){instead}"
        )
    forced, other = environment.get("NVIDIA_TF32_OVERRIDE"), {"fp32": "1", "tf32": "0"}.get(precision)
    if forced is not None and forced == other:
        instead = "tf32" if precision == "fp32" else "fp32"
        raise ConfigError(
            f"precision={precision}, but the environment says NVIDIA_TF32_OVERRIDE={forced}, which NVIDIA's libraries obey "
            f"first; unset it, or set precision={instead}"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise ConfigError(
            f"the launcher or environment says ACCELERATE_DYNAMO_BACKEND={compiler}, but posttrain does not compile its "
            "models (rows differ in length from step to step); unset it, or use an accelerate config without dynamo"
        )


def check_device(precision: str, device: torch.device) -> None:
    """ConfigError where the device has no such arithmetic."""
    if device.type == "cuda" and COMPUTE[precision] == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"precision={precision}, but this GPU has no bf16; try precision=fp16, or precision=fp32")


def described(precision: str, device: torch.device) -> str:
    """The precision, and where it comes to another on this device."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return f"{precision} (which is fp32 on this device)" if precision == "tf32" and not has_tf32 else precision
