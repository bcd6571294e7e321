"""Whether a step may be taken: what of its loss and gradient is not finite, whose fault that is, and what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain import checkpoint
from posttrain.data.loader import Step
from posttrain.errors import TrainingError
from posttrain.runtime import Runtime

if TYPE_CHECKING:
    from posttrain.session import Session

LOSS_AT_FAULT = "the loss is not finite"


def check_finite(session: Session, norm: Tensor, losses: Tensor, step: Step) -> bool:
    """Whether to update. What is not finite ends the run, but gradients that overflowed for the loss scale (fp16): they
    lower it. norm: of the whole gradient. losses: [micro-batches], of this rank."""
    runtime, scaler = session.runtime, session.runtime.loss_scaler
    # sampled answers may all be equally good
    if not session.state.step and not float(norm) and not session.cfg.stage.answers:
        raise TrainingError(
            "no gradient reaches the trained parameters at step 1: the run would change nothing. This is a defect of the "
            "model, the adapter or a library's kernel; try adapter=none, or model.attention=eager"
        )
    found = not_finite(norm, losses, step)
    if runtime.world > 1:
        found = first_cause(runtime, norm, found)
    if found and lowers_scale(session, found):
        return False
    if found:
        done = checkpoint.complete(session.run.checkpoints)
        other = "bf16, which has fp32's range" if scaler is not None else "fp32"
        raise TrainingError(
            f"{found}. Nothing was updated; the last good checkpoint is {done[-1] if done else 'none yet'}. "
            f"Try a smaller optim.lr, or precision={other}"
        )
    if scaler is not None:
        scaler.settle(finite=True)
    return True


def not_finite(norm: Tensor, losses: Tensor, step: Step) -> str | None:
    """What of a step is not finite, and this rank's examples in it; None if all is well.

    norm: of the whole gradient. losses: [micro-batches]; where one is at fault, its examples alone are named.
    """
    good = torch.isfinite(losses)
    if torch.isfinite(norm) & good.all():
        return None
    what, suspects = f"the gradient is not finite ({float(norm)})", step.micro_batches
    if not good.all():
        what = LOSS_AT_FAULT
        suspects = [m for m, fine in zip(step.micro_batches, good.tolist(), strict=True) if not fine]
    ids = [i for micro in suspects for i in micro.ids]
    shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
    return f"{what} at step {step.number + 1}; this rank's examples: {shown}"


def first_cause(runtime: Runtime, norm: Tensor, found: str | None) -> str | None:
    """Of all ranks: that of a rank whose loss is at fault, for the gradient, which all share, spoils with it."""
    if torch.isfinite(norm):
        return found
    told = runtime.gather([found and found.replace("this rank's", f"rank {runtime.rank}'s")])
    return next((cause for cause in told if cause and LOSS_AT_FAULT in cause), told[0])


def lowers_scale(session: Session, found: str) -> bool:
    """Whether a smaller loss scale may mend it; then it is set, and the step counts as skipped."""
    scaler, state = session.runtime.loss_scaler, session.state
    if scaler is None or LOSS_AT_FAULT in found:
        return False
    if scaler.is_at_floor:
        raise TrainingError(
            f"the loss scale fell to {scaler.value:,.0f} and gradients are still not finite: {found}. "
            "Try a smaller optim.lr, or precision=bf16, which needs no loss scale"
        )
    before = scaler.value
    scaler.settle(finite=False)
    state.skipped_steps += 1
    session.console.line(
        f"  · step {state.step + 1}: a gradient overflowed fp16, so nothing was updated; "
        f"loss scale {before:,.0f} -> {scaler.value:,.0f}"
    )
    return True
