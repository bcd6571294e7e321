"""Bottleneck adapters (arXiv:1902.00751, section 2.1): h ← h + W_up·act(W_down·h + b_down) + b_up on the output h of a sublayer,
before the residual sum.

As in the paper both projections have biases: 2·d·m + d + m parameters for a state of d and a width of m. Departures: W_up and
b_up are zero and W_down has torch's own initialisation, where the paper draws both near zero, so that at step 0 the logits are
those of the model to the bit; norms stay frozen. The paper's adapter sits behind the sublayer's last projection: so does this
one where a family puts a norm or a scale between sublayer and sum (gemma2, granite).

peft has no such method. This is one in its own terms (a config, a tuner, a layer), so that saving, loading, disabling and the
score layer beside it are peft's. It stands in peft's tables by name: register_peft_method takes the names of its own list alone.
The layer is a child of the sublayer and acts through a forward hook, so that no module of the model is another than before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.decoder import text_config
from posttrain.models.lineage import NONLINEAR
from posttrain.models.sublayers import find_sublayers, leaves

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig

LARGEST_SHARE = 0.05
"""Of all parameters that a bottleneck adapter may have: beyond it is no small part beside a frozen model."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class BottleneckConfig(PeftConfig):
    """adapter_config.json. target_modules: the sublayers; modules_to_save: a reward model's score layer."""

    width: int = 64
    activation: str = "gelu"
    dropout: float = 0.0
    target_modules: list[str] | set[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NONLINEAR  # a text, as peft's own are too
        self.target_modules = set(self.target_modules or ())


class Bottleneck(nn.Module):
    """One adapter: [..., d] → [..., d]."""

    def __init__(self, states: int, width: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(states, width), nn.Linear(width, states)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """The fp32 weights compute in the run's precision: autocast's within a run, their own where there is none."""
        x = self.dropout(h if torch.is_autocast_enabled(h.device.type) else h.to(self.down.weight.dtype))
        delta: Tensor = self.up(ACTIVATIONS[self.activation](self.down(x)))
        return h + delta.to(h.dtype)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """What peft switches on and off: the adapters of one sublayer by name."""

    adapter_layer_names = ("adapters",)
    weight: Any = None  # peft's properties look for the layer around which it is wrapped, and there is none
    bias: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    def forward(self, h: Tensor) -> Tensor:
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.adapters:
                h = self.adapters[name](h)
        return h


class BottleneckModel(BaseTuner):
    """peft's tuner: puts a layer into each sublayer that the config names."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as peft declares it

    def _create_and_replace(self, peft_config: Any, adapter_name: str, target: nn.Module, *_: Any, **__: Any) -> None:
        states = text_config(self.model).hidden_size
        made = Bottleneck(states, peft_config.width, peft_config.activation, peft_config.dropout)
        layer = BottleneckLayer()
        layer.adapters[adapter_name] = made.to(next(target.parameters()).device)
        insert(target, "bottleneck", layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".bottleneck.adapters.{adapter_name}.", ".bottleneck.")

    def merge_and_unload(self, *_: Any, **__: Any) -> nn.Module:
        """Never: no weights of the model's own compute this."""
        raise ModelError("a bottleneck adapter has a nonlinearity inside and cannot be merged into weights")

    merge_adapter: Any = merge_and_unload


PEFT_TYPE_TO_CONFIG_MAPPING[NONLINEAR] = BottleneckConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[NONLINEAR] = BottleneckModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[NONLINEAR] = BottleneckModel.prefix  # type: ignore[index]


def insert(sublayer: nn.Module, name: str, adapter: nn.Module) -> None:
    """The adapter as a child of the sublayer, behind those that it has."""
    sublayer.add_module(name, adapter)
    if _adapt not in sublayer._forward_hooks.values():
        sublayer.register_forward_hook(_adapt)


def _adapt(sublayer: nn.Module, _: Any, output: Any) -> Any:
    """A function that finds its adapters itself: a copy of the sublayer runs its own. Attentions give a tuple, states first."""
    h = output if isinstance(output, Tensor) else output[0]
    for child in sublayer.children():
        if isinstance(child, Bottleneck | BottleneckLayer):
            h = child(h)
    return h if isinstance(output, Tensor) else type(output)((h, *output[1:]))


def settle(adapted: PeftModel) -> Any:
    """The network with its adapters in place as plain frozen parts, and its trained score layer: what a folded adapter is to
    weights. Another adapter then comes on top, and switching that one off leaves these on."""
    network: Any = adapted.get_base_model()
    for sublayer in list(network.modules()):
        layer = getattr(sublayer, "bottleneck", None)
        if isinstance(layer, BottleneckLayer):
            below = sum(isinstance(child, Bottleneck) for child in sublayer.children())
            del sublayer.bottleneck
            sublayer.add_module(f"bottleneck_{below}", layer.adapters["default"])
    for name, wrapper in list(network.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, wrapper.modules_to_save["default"])
    del network.peft_config
    return network


def fresh_bottleneck(model: PreTrainedModel, adapter: AdapterConfig, task: str, base: int) -> tuple[PeftModel, str]:
    """The model with adapters in the places that adapter.placement means, and a line that says so. base: its parameters."""
    found = find_sublayers(model)
    places = [name for name, kind in found.items() if adapter.placement in ("both", kind)]
    if not places:
        other = "attention" if adapter.placement == "ffn" else "ffn"
        raise ModelError(
            f"adapter.placement={adapter.placement}, but the {model.config.model_type} architecture has no such sublayer; try "
            f"adapter.placement={other}, which it has ({leaves(list(found))})"
        )
    _assert_small(adapter, text_config(model).hidden_size, len(places), base)
    config = BottleneckConfig(
        width=adapter.width,
        activation=adapter.activation,
        dropout=adapter.dropout,
        target_modules=places,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    peft_model: Any = get_peft_model(model, config)
    layers = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    adapted = [name.rpartition(".")[0] for name in layers]
    assert sorted(adapted) == sorted(places), f"peft adapts {set(adapted) ^ set(places)}"
    return peft_model, f"bottleneck width {adapter.width}, {adapter.activation} on {leaves(places)}"


def _assert_small(adapter: AdapterConfig, states: int, places: int, base: int) -> None:
    """ModelError where the adapters would have 5 % of all parameters or more, with the width that fits."""
    size = places * (2 * states * adapter.width + states + adapter.width)
    if size < LARGEST_SHARE * (base + size):
        return
    fits = int((LARGEST_SHARE / (1 - LARGEST_SHARE) * base / places - states) / (2 * states + 1))
    fewer = "" if adapter.placement != "both" else ", or adapter.placement=ffn"
    tip = (
        f"the widest that fits is adapter.width={fits}{fewer}"
        if fits > 0
        else f"no width fits{fewer}; take adapter=lora"
    )
    raise ModelError(
        f"adapter.width={adapter.width} in {places} places of {states} states are {size:,} parameters, "
        f"{size / (base + size):.1%} of all {base + size:,}; a bottleneck adapter has under {LARGEST_SHARE:.0%}: {tip}"
    )
