"""precision=fp8: a network's linear modules become float8 ones (float8_linear.py); which, and why the others do not.

In bf16 stay the first and the last layer of the decoder (as in Megatron's --first-last-layers-bf16 and arXiv:2504.03624; of the
embedded model's loss in float8 the first layer alone spoils two thirds of what all do) and the output or score layer, whose
weight is read as it is; what is not a multiple of 16 wide, which the products need; a mixture's routers, whose choices are made
by small differences; under an adapter all that trains, which are its own small matrices; and, of a state-space mixer, what
fused kernels read past the module. Parameters, their names and what is saved stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.errors import ConfigError, ModelError
from posttrain.models.decoder import Decoder, text_decoder
from posttrain.models.router import Routers

if TYPE_CHECKING:
    from posttrain.config import PrecisionConfig

MULTIPLE = 16
ELSEWHERE = "use precision=bf16"
OUTPUT = "the output layer"


@dataclass(frozen=True)
class Float8:
    """recipe: tensorwise or rowwise. emulate: products in fp32 of operands rounded to float8."""

    recipe: str
    emulate: bool


def float8_of(precision: PrecisionConfig) -> Float8 | None:
    """What precision.* asks for; None where it is not fp8."""
    return Float8(precision.recipe, precision.emulate) if precision.name == "fp8" else None


def check_float8(float8: Float8 | None, device: torch.device) -> None:
    """ConfigError where torchao is missing, or the device cannot multiply in float8 and nothing asks to emulate it."""
    if float8 is None:
        return
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ConfigError("precision=fp8 needs the package torchao; pip install 'posttrain[fp8]'") from error
    if float8.emulate:
        return
    hint = f"{ELSEWHERE}, or precision.emulate=true to try it out slowly"
    if device.type != "cuda":
        raise ConfigError(f"precision=fp8, but there is no GPU, and processors do not multiply in float8; {hint}")
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is None and (major, minor) < (8, 9):
        raise ConfigError(
            f"precision=fp8 needs a GPU of compute capability 8.9 or later, and {name} has {major}.{minor}; {hint}"
        )
    try:
        _try_out(float8, device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"precision=fp8 precision.recipe={float8.recipe} does not run on {name}: {reason}; "
            f"try the other recipe, {hint}"
        ) from error


def _try_out(float8: Float8, device: torch.device) -> None:
    """One small layer, forward and backward, of a number of tokens that is no multiple of 16."""
    from posttrain.models.float8_linear import float8_config, to_float8

    layer = to_float8(nn.Linear(32, 32, device=device), float8_config(float8.recipe, emulate=False))
    with torch.autocast(device.type, torch.bfloat16):
        layer(torch.ones(5, 32, device=device, requires_grad=True)).sum().backward()
    torch.cuda.synchronize(device)


def convert(decoder: Decoder, float8: Float8, adapted: bool) -> str:
    """Convert the decoder's linear modules in place; a line that says how many, and why the others stay. ModelError at none.

    adapted: the network is frozen under an adapter.
    """
    from posttrain.models.float8_linear import float8_config, to_float8

    config = float8_config(float8.recipe, float8.emulate)
    kept: Counter[str] = Counter()
    chosen = []
    network: Any = decoder.network
    for name, module, reason in _judged(network, adapted):
        if reason:
            kept[reason] += 1
        else:
            chosen.append((name, module))
    told = ", ".join(reason if reason == OUTPUT else f"{count} {reason}" for reason, count in kept.items())
    if not chosen:
        found = f"of its {sum(kept.values())} none can be converted ({told})" if kept else "it has none"
        raise ModelError(
            f"precision=fp8 multiplies in linear modules, and this is a {network.config.model_type} model: {found}; {ELSEWHERE}"
        )
    for name, module in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, to_float8(module, config))
    how = float8.recipe + (", emulated" if float8.emulate else "")
    return f"{len(chosen)} of {len(chosen) + sum(kept.values())} linear modules ({how}); in bf16 stay {told}"


def _judged(network: Any, adapted: bool) -> Iterator[tuple[str, nn.Linear, str]]:
    """Every linear module that text reaches, and why it stays; "" where it is to be converted."""
    decoder, outputs = text_decoder(network), _outputs(network)
    inside, ends = set(decoder.modules()), _ends(decoder)
    routers = {module for router, _ in Routers(network).modules for module in router.modules()}
    fused = {module for mixer in network.modules() for module in _read_past(mixer)}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or not (module in inside or module in outputs):
            continue
        reasons = {
            OUTPUT: module in outputs,
            "of the adapter": adapted and module.weight.requires_grad,
            f"of type {type(module).__name__}": type(module) is not nn.Linear,
            "in the first and the last layer": module in ends,
            "of routers": module in routers,
            "read by fused kernels": module in fused,
            f"not a multiple of {MULTIPLE} wide": bool(module.in_features % MULTIPLE or module.out_features % MULTIPLE),
        }
        yield name, module, next((reason for reason, holds in reasons.items() if holds), "")


def _ends(decoder: nn.Module) -> set[nn.Module]:
    """All modules in the first and the last of the decoder's layers, and what stands before the first."""
    layers = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None:
        return set()
    between = {module for layer in list(layers)[1:-1] for module in layer.modules()}
    return set(decoder.modules()) - between


def _outputs(network: Any) -> set[Any]:
    """The output layer, or a reward model's score layer (inside an adapter that trains it: its copies)."""
    head = network.get_output_embeddings() or getattr(network, "score", None)
    return set(head.modules()) if head is not None else set()


def _read_past(module: nn.Module) -> list[Any]:
    """A state-space mixer's projections whose weights fused kernels read directly."""
    if not (hasattr(module, "A_log") and hasattr(module, "D")):
        return []
    return [found for name in ("out_proj", "dt_proj") if (found := getattr(module, name, None)) is not None]
