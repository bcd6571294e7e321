"""distribution=deepspeed: DeepSpeed's ZeRO. Gradients and optimizer are in parts on the ranks, in stage 3 (zero3.py) weights too.

ZeRO joins the parameters of each of an optimizer's groups to one flat tensor, of which every rank keeps and moves its part. A
checkpoint has them put together again, in torch's own order: any other distribution goes on from it, and this from any other's.

The trainer's sums over micro-batches stay as they are: DeepSpeed is told which backward is a step's last, and averages over
ranks as DDP does. It clips inside its own step.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from posttrain.errors import CheckpointError, ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 25_000_000
"""Gradients that are reduced at a time, and in stage 3 weights that are gathered ahead: 100 MB in fp32."""


def check_installed() -> None:
    """ConfigError where there is no DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "distribution=deepspeed needs a package that is not installed: pip install 'posttrain[deepspeed]'; "
            "distribution=fsdp splits weights, gradients and optimizer over the ranks without it"
        )


class Zero(nn.Module):
    """Stage 2: what stages call in the policy's place, and the optimizer's steps. optimizer: torch's AdamW, with its state of a
    checkpoint if there is one. half: what the forward pass computes in, None for the weights' own dtype."""

    settings: ClassVar[dict[str, Any]] = {"stage": 2}
    """DeepSpeed's own, of zero_optimization."""

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        offload: bool,
        half: torch.dtype | None,
        max_norm: float,
    ) -> None:
        super().__init__()
        self.optimizer, known = optimizer, dict(optimizer.state)
        self.groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
        optimizer.state.clear()
        device = next(policy.parameters()).device.type
        self.policy = InPrecision(policy, device, half)
        with ExitStack() as changed:  # of the process: given back at the end, or at once where this fails
            changed.enter_context(_local_rank())
            changed.callback(
                setattr, nn.functional, "linear", nn.functional.linear
            )  # stage 3 puts another in its place
            self.engine: Any = _engine(self.policy, optimizer, self.settings, offload, max_norm, device)
            self._fill(known)
            self.changed = changed.pop_all()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy.restored(self.engine(*args, **kwargs))

    def close(self) -> None:
        """The run is over, and the process may hold another."""
        self.changed.close()

    def accumulates(self, last: bool) -> None:
        """Whether the next backward is the step's last."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Clip and move; returns the global norm before clipping. Where it is not finite nothing moves."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state(self) -> dict[str, Any]:
        """The optimizer's state as torch's own would save it, whole, in host memory; every rank must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {p: self.optimizer.state[flat]["step"] for parameters, flat in self._parts() for p in parameters}
        state: dict[int, dict[str, Tensor]] = {}
        groups = []
        for group in self.groups:
            places = range(len(state), len(state) + len(group["params"]))
            for place, parameter in zip(places, group["params"], strict=True):
                found = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
                state[place] = {"step": steps[parameter].cpu().clone(), **found}
            groups.append(group | {"params": list(places), "lr": self.optimizer.param_groups[0]["lr"]})
        return {"state": state, "param_groups": groups}

    def weights(self, keep: bool, trained_alone: bool) -> dict[str, Tensor]:
        """Name → tensor, tied ones once, each in memory of its own: here they are pieces of one; empty where not `keep`."""
        own: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in self.policy.policy.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and (tensor.requires_grad or not trained_alone):
                if id(tensor) not in own:
                    own[id(tensor)] = self._whole(tensor, keep)
                found[name] = own[id(tensor)]
        return found if keep else {}

    def _whole(self, tensor: Tensor, keep: bool) -> Tensor:
        """The tensor in host memory, where `keep`."""
        return tensor.detach().to("cpu", copy=True) if keep else tensor

    def _parts(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """The parameters that were joined, and this rank's part of them, which the optimizer knows."""
        flat = [group["params"][0] for group in self.optimizer.param_groups]
        return [(group["params"], part) for group, part in zip(self.groups, flat, strict=True)]

    def _fill(self, known: dict[Tensor, dict[str, Tensor]]) -> None:
        """Moments of every group, from the whole ones or 0. DeepSpeed would only find those of the first group by itself."""
        for parameters, flat in self._parts():
            steps = {float(known[p]["step"]) if p in known else 0.0 for p in parameters}
            if len(steps) > 1:
                raise CheckpointError(
                    f"the checkpoint's weights have moved {' and '.join(f'{s:g}' for s in sorted(steps))} times, some more than "
                    "others, and DeepSpeed counts them together; go on with distribution=fsdp or ddp"
                )
            self.optimizer.state[flat] = {"step": torch.tensor(steps.pop(), device=flat.device)}
            self.optimizer.state[flat] |= {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            self._joined(parameters, flat)
        for parameter, state in known.items():
            for name in MOMENTS:
                self._set(parameter, state[name], name)

    def _joined(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        """Let each parameter know where its moments are."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _set(self, parameter: Tensor, value: Tensor, name: str) -> None:
        """This rank's part of a parameter's moment, of the whole one."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)


class InPrecision(nn.Module):
    """The policy under autocast: DeepSpeed turns off one that is around its engine. What it gives goes through the engine as a
    dict, in which stage 3 finds the tensors whose backward it must hear of."""

    def __init__(self, policy: nn.Module, device: str, half: torch.dtype | None) -> None:
        super().__init__()
        self.policy, self.device, self.computes_in = policy, device, half
        self.kind: type | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, self.computes_in, enabled=self.computes_in is not None):
            found = self.policy(*args, **kwargs)
        self.kind = type(found) if is_dataclass(found) else None
        return found if self.kind is None else dict(vars(found))

    def restored(self, found: Any) -> Any:
        """What the policy gave."""
        return found if self.kind is None else self.kind(**found)


def _engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    offload: bool,
    max_norm: float,
    device: str,
) -> Any:
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    for called in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # its affair
        warnings.filterwarnings("ignore", f".*{called}. is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(_concerns_the_user)
    if device == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else it would compile its own all-reduce here, in every rank
    zero: dict[str, Any] = {**settings, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it wants a number, and does nothing with it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Not a warning of the policy's own outputs, which InPrecision makes a dict of."""
    return "unknown inputs or outputs" not in str(record.msg)


@contextmanager
def _local_rank() -> Iterator[None]:
    """DeepSpeed will have a launcher's variable where one process runs alone; Accelerate would take it for one of several."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
