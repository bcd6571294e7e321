"""Saving models so that others load them: transformers for whole models, peft for adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from posttrain.models.networks import CRITIC, CRITIC_HEAD, Networks
from posttrain.models.policy import ValueModel
from posttrain.models.reward import POOLING_KEY, RewardModel


def save_model(
    networks: Networks,
    directory: Path,
    ends: set[int],
    dtype: torch.dtype | None = None,
    critic: bool = True,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Weights (or adapter), config, generation_config, tokenizer, and a policy's critic.

    ends: what generation must stop at; saved in generation_config, beside what was there. dtype: of the saved weights;
    None keeps them exactly as they are trained. state: the module's tensors, where its own lie in parts on the ranks.
    """
    network, tokenizer = _prepared(networks, directory, ends)
    given = _below(state, "model.")
    if networks.module.model is not network:
        said = {} if given is None else {"state_dict": given}
        networks.module.model.save_pretrained(directory, save_embedding_layers=False, **said)
        if network.can_generate():
            network.generation_config.save_pretrained(directory)
        else:  # peft keeps no config, and transformers would take one for a whole model's
            how = {POOLING_KEY: networks.module.pooling}
            (directory / "posttrain.json").write_text(json.dumps(how) + "\n", encoding="utf-8")
    elif dtype is None or dtype == network.dtype:
        network.save_pretrained(directory, state_dict=given)
    else:
        weights = network.state_dict() if given is None else given
        cast = {name: _cast(tensor, dtype) for name, tensor in weights.items()}
        trained_in, network.config.dtype = network.config.dtype, dtype
        network.save_pretrained(directory, state_dict=cast)
        network.config.dtype = trained_in
        _write_dtype(directory, dtype)
    tokenizer.save_pretrained(directory)
    if critic:
        _save_critic(getattr(networks.module, "critic", None), tokenizer, directory / CRITIC, _below(state, "critic."))


def save_config(networks: Networks, directory: Path, ends: set[int]) -> None:
    """What save_model saves but the weights, which are elsewhere."""
    network, tokenizer = _prepared(networks, directory, ends)
    _save_config(network, directory)
    if network.can_generate():
        network.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    critic = getattr(networks.module, "critic", None)
    if isinstance(critic, ValueModel):
        _save_config(critic.network, directory / CRITIC)
        tokenizer.save_pretrained(directory / CRITIC)


def _save_config(network: Any, directory: Path) -> None:
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    config.save_pretrained(directory)


def _prepared(networks: Networks, directory: Path, ends: set[int]) -> tuple[Any, Any]:
    """The network and the tokenizer, with what others are to know of padding or of where answers end."""
    directory.mkdir(parents=True, exist_ok=True)
    network: Any = networks.module.network
    if isinstance(networks.module, RewardModel):
        return network, set_padding(network, networks.tokenizer, ends)
    _set_generation_config(network, networks.tokenizer, ends)
    return network, networks.tokenizer


def _below(state: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    """The tensors whose names begin so, without that beginning."""
    if state is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _save_critic(critic: Any, tokenizer: Any, directory: Path, state: dict[str, torch.Tensor] | None) -> None:
    if isinstance(critic, ValueModel):
        critic.network.save_pretrained(directory, state_dict=_below(state, "model."))
        tokenizer.save_pretrained(directory)
    elif critic is not None:
        directory.mkdir()
        save_file(critic.state_dict() if state is None else state, directory / CRITIC_HEAD)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_dtype(directory: Path, dtype: torch.dtype) -> None:
    """The library writes the dtype the model has in memory; the file must name the one its weights have."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


NO_PADDING = (
    "the tokenizer has no special token to spare for padding, so the reward model is saved without one: transformers scores "
    "its texts one at a time, and refuses several in a batch"
)


def free_pad(tokenizer: Any, ends: set[int]) -> int | None:
    """A token to pad with that no rendered text holds: the tokenizer's own pad, if it is apart; else its unknown token or
    another special one that neither ends a turn nor begins a text; None where there is none, as in gpt2's."""
    taken = {*ends, tokenizer.eos_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids}
    taken -= {tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template or ""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id) if i is not None]
    free = [i for i in [*named, *added] if i not in taken | {tokenizer.eos_token_id, *ends}]
    free = [i for i in free if tokenizer.convert_ids_to_tokens(i) not in str(template)]
    return free[0] if free else None


def set_padding(network: Any, tokenizer: Any, ends: set[int]) -> Any:
    """The tokenizer with a pad token that no rendered text holds, the config with its id: transformers' class scores the
    last token that is not it, and with pad = end-of-turn would score the one before. Where there is none the model is saved
    without a pad id and scores rows one at a time."""
    padded = copy.deepcopy(tokenizer)
    pad = free_pad(tokenizer, ends)
    if pad is not None:
        padded.pad_token = tokenizer.convert_ids_to_tokens(pad)
    padded.padding_side = "right"
    network.config.pad_token_id = network.config.get_text_config().pad_token_id = pad
    return padded


def _set_generation_config(network: Any, tokenizer: Any, ends: set[int]) -> None:
    config = network.generation_config
    had = config.eos_token_id
    known = set() if had is None else set(had) if isinstance(had, list) else {had}
    stops = sorted(known | ends)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not config.do_sample:  # the library refuses to save sampling settings beside greedy decoding
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
