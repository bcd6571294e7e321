"""LoRA finds its targets in each family and changes nothing at step 0."""

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, GROUPS
from transformers import AutoConfig

from posttrain.data.batches import collate
from posttrain.errors import ModelError
from posttrain.models.adapters import add_adapter, find_targets, parameter_count, quantization
from posttrain.models.load import load_model
from posttrain.models.policy import Policy

SEPARATE = {"q_proj", "v_proj"}
LATENT = {"q_b_proj", "kv_b_proj"}
QV = {
    "gpt2": {"c_attn"}, "gpt_bigcode": {"c_attn"}, "openai-gpt": {"c_attn"}, "gpt_neox": {"query_key_value"},
    "falcon": {"query_key_value"}, "falcon-alibi": {"query_key_value"}, "bloom": {"query_key_value"},
    "persimmon": {"query_key_value"}, "phi3": {"qkv_proj"}, "codegen": {"qkv_proj"}, "mpt": {"Wqkv"}, "dbrx": {"Wqkv"},
    "ctrl": {"Wq", "Wv"}, "jetmoe": {"kv_proj"}, "minicpm3": LATENT, "deepseek_v2": LATENT, "deepseek_v3": LATENT,
    "rwkv": {"receptance", "value"}, "xlstm": {"q", "v"}, "qwen3_next": {*SEPARATE, "in_proj_qkvz"},
    "minimax": {*SEPARATE, "qkv_proj"}, "qwen3_5_text": {*SEPARATE, "in_proj_qkv"},
}  # fmt: skip
NO_QV = ("mamba", "mamba2", "falcon_mamba")


def lora(targets: str | list[str]) -> Any:
    return SimpleNamespace(name="lora", path=None, targets=targets, rank=2, alpha=4, dropout=0.0, rslora=False)


def adapter_size(network: Any) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def leaves(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_found_and_step_0_is_the_same_to_the_bit(family: str) -> None:
    network = families.network(family)
    if family in NO_QV:
        with pytest.raises(ModelError, match=r"adapter\.targets=qv matches no linear module here; there are: in_proj"):
            find_targets(network, "qv")
    else:
        qv, qkvo = find_targets(network, "qv"), find_targets(network, "qkvo")
        assert leaves(qv) == QV.get(family, SEPARATE)
        assert set(qv) <= set(qkvo) <= set(find_targets(network, "all-linear"))
    every = find_targets(network, "all-linear")
    head = {n for n, m in network.named_modules() if m is network.get_output_embeddings()}
    assert not head & set(every)
    assert not [name for name in every if "vision" in name or name.endswith((".router", ".gate", ".router.layer"))]
    batch = collate(GROUPS, [[0], [1], [2]], "padded")
    with torch.no_grad():
        before = Policy(network).hidden(batch)
        adapted, described = add_adapter(network, lora("all-linear"), seed=0)
        ours = Policy(adapted.eval())
        assert torch.equal(ours.hidden(batch), before)
    assert f"({len(every)} modules)" in described
    objective = ours(batch, weights=torch.ones(sum(g.trained_tokens for g in GROUPS))).objective
    objective.backward()
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(every)
    reached = [name for name, p in trained.items() if "lora_B" in name and p.grad is not None and bool(p.grad.any())]
    assert len(reached) == len(every), "an adapter that no gradient reaches"


def test_a_fused_projection_is_adapted_whole_and_said() -> None:
    _, described = add_adapter(families.network("gpt2"), lora("qv"), seed=0)
    assert "c_attn (2 modules) (fused projection c_attn adapted whole)" in described
    _, described = add_adapter(families.network("llama"), lora("qv"), seed=0)
    assert "fused" not in described


def test_experts_that_stay_as_they_are_are_said() -> None:
    _, described = add_adapter(families.network("mixtral"), lora("all-linear"), seed=0)
    assert "(the mixture's feed-forward layers are not adapted)" in described


def test_a_list_and_what_matches_nothing() -> None:
    network = families.network("llama")
    assert leaves(find_targets(network, ["up_proj", "q_proj"])) == {"up_proj", "q_proj"}
    with pytest.raises(ModelError, match=r"adapter.targets=c_attn matches no linear module here; there are: down_proj"):
        find_targets(network, ["q_proj", "c_attn"])


def test_a_4_bit_base_passes_gradients_on_after_an_evaluation() -> None:
    families.network("llama").save_pretrained("base")
    adapter = SimpleNamespace(**{**vars(lora("qkvo")), "name": "qlora"})
    settings = {"path": "base", "gguf_file": None, "revision": None, "init": "weights", "attention": "auto"}
    model: Any = SimpleNamespace(**settings, trust_remote_code=False)
    config = AutoConfig.from_pretrained("base")
    base = load_model(model, config, torch.float32, 0, quantization(adapter, torch.float32))
    network, described = add_adapter(base, adapter, seed=0)
    assert "qlora rank 2" in described
    assert parameter_count(base) == sum(p.numel() for p in families.network("llama").parameters()) + adapter_size(
        network
    )
    ours, batch = Policy(network), collate(GROUPS, [[0], [1], [2]], "padded")
    weights = torch.ones(len(batch.targets))

    def gradients() -> list[torch.Tensor]:
        ours.train()
        trained = [p for p in ours.parameters() if p.requires_grad]
        return list(torch.autograd.grad(ours(batch, weights=weights).objective, trained))

    before = gradients()
    with torch.no_grad():
        ours.eval()(batch, statistics=True)
    assert any(bool(gradient.any()) for gradient in before)
    for a, b in zip(before, gradients(), strict=True):
        torch.testing.assert_close(a, b)
