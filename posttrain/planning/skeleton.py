"""A network of which one decoder layer is real, with random numbers, and the embeddings and heads; the others let states through.

So a layer runs with the masks, positions and dtypes of the whole model, on the run's device, and no weights are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.decoder import Decoder, text_config


@dataclass(frozen=True)
class Kind:
    """Layers alike: the first of them, and how many there are. decoder: whose."""

    decoder: Decoder
    layer: nn.Module
    count: int


class Unmeasurable(Exception):
    """Why this architecture cannot be run a layer at a time."""


class Skeleton:
    """`module`: a Policy or RewardModel whose parameters are on the meta device, from build_network."""

    def __init__(self, module: Decoder, device: torch.device) -> None:
        self.module, self.device = module, device
        critic = getattr(module, "critic", None)
        self.decoders = [module, critic] if isinstance(critic, Decoder) else [module]
        self.layers = {id(d): layers_of(d) for d in self.decoders}
        self.kinds = [kind for decoder in self.decoders for kind in self._kinds(decoder)]
        self._tuples: dict[int, bool] = {}
        inside = {m for stack in self.layers.values() for layer in stack for m in layer.modules()}
        self._fill(part for part in module.modules() if part not in inside)
        for layers in self.layers.values():
            for layer in layers:
                self._skip(layer)

    def _kinds(self, decoder: Decoder) -> Iterator[Kind]:
        """Layers of the same modules, shapes and attention are of one kind."""
        types = getattr(text_config(decoder.network), "layer_types", None)
        layers = self.layers[id(decoder)]
        signatures = [
            (type(layer), types[i] if types else None, *((n, p.shape, p.dtype) for n, p in layer.named_parameters()))
            for i, layer in enumerate(layers)
        ]
        for signature, count in Counter(signatures).items():
            yield Kind(decoder, layers[signatures.index(signature)], count)

    @contextmanager
    def real(self, kind: Kind) -> Iterator[None]:
        """Within the block this kind's first layer computes."""
        self._fill(kind.layer.modules())
        vars(kind.layer).pop("forward")
        hook = kind.layer.register_forward_hook(lambda _, __, out: self._note(kind, isinstance(out, tuple)))
        try:
            yield
        finally:
            hook.remove()
            self._skip(kind.layer)

    def _note(self, kind: Kind, is_tuple: bool) -> None:
        self._tuples[id(kind.decoder)] = is_tuple

    def _skip(self, layer: nn.Module) -> None:
        owner = next(key for key, layers in self.layers.items() if any(layer is each for each in layers))

        def forward(*args: Any, **kwargs: Any) -> Any:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            if torch.is_grad_enabled() and not states.requires_grad:  # the gradient that adapters below would ask for
                states = states.detach().requires_grad_()
            return (states,) if self._tuples.get(owner) else states

        vars(layer)["forward"] = forward

    def _fill(self, modules: Iterable[nn.Module]) -> None:
        """Their own parameters and buffers with random numbers, where they have none; what is shared stays shared."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id stays its own
        for module in modules:
            own: dict[str, Any] = {**module._parameters, **module._buffers}
            missing = {name: t for name, t in own.items() if t is not None and t.is_meta}
            for name, tensor in missing.items():
                into: Any = module._parameters if name in module._parameters else module._buffers
                if id(tensor) not in made:
                    made[id(tensor)] = (self._like(tensor), tensor)
                into[name] = made[id(tensor)][0]
            if missing and type(module).__name__ != "Linear4bit":
                self._owner(module).network._init_weights(module)

    def _owner(self, module: nn.Module) -> Decoder:
        """Whose numbers these are: the critic's, or the trained network's."""
        return next((d for d in self.decoders[1:] if any(module is m for m in d.modules())), self.decoders[0])

    def _like(self, tensor: Tensor) -> Tensor:
        if type(tensor).__name__ == "Params4bit":
            values, quantized = torch.randn(tensor.shape, dtype=tensor.dtype), type(tensor)
            made: Tensor = quantized(values, requires_grad=False, **vars(tensor)).to(self.device)  # type: ignore[call-overload]
            return made
        zeros = torch.zeros_like(tensor, device=self.device)
        return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


def layers_of(decoder: Decoder) -> nn.ModuleList:
    """Its stack of layers."""
    depth = text_config(decoder.network).num_hidden_layers
    for module in decoder.backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise Unmeasurable(f"the {decoder.network.config.model_type} architecture has no plain stack of {depth} layers")


@contextmanager
def calls(layer: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of every call of the layer meanwhile."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def boundary(layer: nn.Module, reached: Callable[[], None]) -> Iterator[None]:
    """Calls `reached` once the backward pass has come down to this layer's output."""

    def watch(_: Any, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: reached())

    hook = layer.register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()
