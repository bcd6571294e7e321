"""What model.path may hold that cannot be trained or read, each refused by name, with what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from posttrain.errors import ModelError
from posttrain.models.lineage import is_reward_model, lineage, nonlinear, resolve_path

if TYPE_CHECKING:
    from posttrain.config import ModelConfig

NOT_DECODERS = {
    "bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "bert-generation", "big_bird", "data2vec-text",
    "ernie", "megatron-bert", "rembert", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta-xl", "xmod",
    "prophetnet", "bart", "mbart", "marian", "pegasus", "blenderbot", "plbart", "trocr", "whisper", "mvp",
    "bigbird_pegasus", "blenderbot-small", "xlnet", "reformer", "cpmant", "git", "blt",
    "musicgen", "musicgen_melody", "gemma4_assistant", "gemma4_unified_assistant",
}  # fmt: skip
"""Model types the library lists as causal but that are encoders, halves of encoder-decoders, prefix-masked, or read
more than tokens (byte patches, codebooks, another model's states)."""


def refuse_other_architectures(config: PreTrainedConfig, model: ModelConfig) -> None:
    """What is no causal decoder, or one that the library does not have."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or kind in NOT_DECODERS:
        raise ModelError(
            f"{model.path} is a {kind} model: an encoder, encoder-decoder or prefix model. "
            "posttrain trains causal decoders only (llama, qwen, mistral, gemma, gpt2, ...)"
        )
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (remote and model.trust_remote_code):
        hint = "; its code comes with it: model.trust_remote_code=true runs that code" if remote else ""
        raise ModelError(f"{model.path} is a {kind} model, which transformers has no causal language model for{hint}")


def refuse_unscored(config: PreTrainedConfig, model: ModelConfig) -> None:
    """An architecture that the library gives no sequence classifier."""
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"{model.path} is a {config.model_type} model, which transformers has no sequence classifier for, and so no "
            "reward model that others could load; use another family (llama, qwen, mistral, gemma, gpt2, ...)"
        )


def refuse_scores(model: ModelConfig) -> None:
    """A reward model in a policy's place."""
    if is_reward_model(resolve_path(model.path)):
        raise ModelError(f"model.path={model.path} is a reward model: it scores answers and writes none; give a policy")


def refuse_folding_into_4bit(model: ModelConfig) -> NoReturn:
    """An adapter, whose base would be quantised before it is folded in."""
    path = resolve_path(model.path)
    base, _ = lineage(path)
    merged = "fold it in with posttrain merge and give the result, or go on training it: "
    on = f"{merged}model.path={base} adapter=qlora adapter.path={path}"
    raise ModelError(
        f"model.path={model.path} is an adapter, which would have to be folded into 4-bit weights for adapter=qlora; "
        f"{'take adapter=lora' if nonlinear(path) else on}"
    )


def refuse_unfit(model: ModelConfig, missing: list[str], mismatched: list[str]) -> None:
    """Weights that the config asks for and the files have not, or have in another shape."""
    if missing:
        raise ModelError(
            f"{model.path} lacks {len(missing)} of the weights its config asks for (first: {', '.join(missing[:3])}); "
            "use a complete checkpoint, or model.init=config for random weights"
        )
    if mismatched:
        raise ModelError(f"the weights of {model.path} do not fit model.config: {', '.join(mismatched[:3])}")


def cannot_read(model: ModelConfig, what: str, error: Exception | str) -> str:
    """The text for a part of model.path that the library has failed to read: what is there instead, what to give."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    path = resolve_path(model.path)
    base, adapters = lineage(path)
    if adapters:
        return (
            f"model.path={model.path} is an adapter, and the {what} of its base {base} cannot be read: {first_line}. Give both "
            f"apart: model.path=BASE adapter={'bottleneck' if nonlinear(path) else 'lora'} adapter.path={path}"
        )
    if Path(path).is_dir():
        found = ", ".join(sorted(p.name for p in Path(path).iterdir())[:8]) or "nothing"
        return f"cannot read the {what} of model.path={model.path} (it holds: {found}): {first_line}"
    return (
        f"cannot read the {what} of model.path={model.path}: no such directory, and the hub gave: {first_line}. "
        "Give a directory with config.json and weights, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )
