"""LoRA finds its targets in each family and changes nothing at step 0."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, GROUPS
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.data.batches import collate
from posttrain.errors import ModelError
from posttrain.models.adapters import add_adapter, parameter_count, quantization
from posttrain.models.lineage import lineage
from posttrain.models.load import load_model
from posttrain.models.policy import Policy
from posttrain.models.targets import find_targets

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


def lora(targets: str | list[str], **changes: Any) -> Any:
    plain = {"rslora": False, "dora": False, "ranks": {}, "alphas": {}}
    return SimpleNamespace(name="lora", path=None, targets=targets, rank=2, alpha=4, dropout=0.0, **plain | changes)


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


def updates(adapter: Any) -> dict[str, torch.Tensor]:
    """Each q_proj and v_proj of a llama's first layer → what an adapter with B = 1 adds there to an input of ones, over A·1."""
    model, _ = add_adapter(families.network("llama"), adapter, seed=0)
    found = {}
    for leaf in ("q_proj", "v_proj"):
        module: Any = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{leaf}")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        ones = torch.ones(1, a.shape[1])
        with torch.no_grad():
            b.fill_(1.0)
            found[leaf] = (module(ones) - module.base_layer(ones))[0, 0] / a.sum()
        assert a.shape[0] == adapter.ranks.get(leaf, adapter.rank)
    return found


def test_scales_ranks_and_alphas_are_as_asked() -> None:
    """α/r, α/√r with rsLoRA, each module's own where it has one."""
    of = {"plain": updates(lora("qv")), "rslora": updates(lora("qv", rslora=True)),
          "own": updates(lora("qv", ranks={"q_proj": 8}, alphas={"self_attn.v_proj": 7.0}))}  # fmt: skip
    given = {name: {leaf: float(scale) for leaf, scale in found.items()} for name, found in of.items()}
    assert given["plain"] == pytest.approx({"q_proj": 4 / 2, "v_proj": 4 / 2}, rel=1e-4)
    assert given["rslora"] == pytest.approx({"q_proj": 4 / 2**0.5, "v_proj": 4 / 2**0.5}, rel=1e-4)
    assert given["own"] == pytest.approx({"q_proj": 4 / 8, "v_proj": 7 / 2}, rel=1e-4)


def test_an_adapter_names_its_base_for_other_working_directories(tmp_path: Path) -> None:
    families.network("llama").save_pretrained("base")
    network = AutoModelForCausalLM.from_pretrained("base")
    adapted, _ = add_adapter(network, lora("qv"), seed=0)
    adapted.save_pretrained("adapter")
    assert lineage("adapter") == (str(tmp_path / "base"), ["adapter"])


def test_a_module_that_is_not_adapted_has_no_rank_of_its_own() -> None:
    _, described = add_adapter(families.network("llama"), lora("qv", ranks={"q_proj": 8}, dora=True), seed=0)
    assert described == "lora rank 2 (q_proj 8), alpha 4, DoRA on q_proj, v_proj (4 modules)"
    with pytest.raises(
        ModelError, match=r"adapter\.alphas\.k_proj matches no adapted module; adapted are: q_proj, v_proj"
    ):
        add_adapter(families.network("llama"), lora("qv", alphas={"k_proj": 8.0}), seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_begins_with_the_logits_of_the_model(family: str, dtype: torch.dtype) -> None:
    """To the bit, also over weights in bf16, whose norms bf16 cannot hold; and its norms train."""
    ids = torch.arange(3, 20)[None]
    network = families.network(family).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        before = network(ids).logits
        adapted, _ = add_adapter(network, lora("all-linear", dora=True), seed=0)
        assert torch.equal(adapted.eval()(ids).logits, before)
    adapted(ids).logits.float().square().mean().backward()
    norms = [p for name, p in adapted.named_parameters() if "magnitude" in name]
    assert len(norms) == len(find_targets(families.network(family), "all-linear"))
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(p.grad.any()) for p in norms)


def test_dora_over_4_bits_begins_where_the_model_is() -> None:
    families.network("llama").save_pretrained("base")
    adapter = SimpleNamespace(**{**vars(lora("qkvo", dora=True)), "name": "qlora"})
    settings = {"path": "base", "gguf_file": None, "revision": None, "init": "weights", "attention": "auto"}
    model: Any = SimpleNamespace(**settings, trust_remote_code=False)
    ids = torch.arange(3, 20)[None]
    base = load_model(
        model, AutoConfig.from_pretrained("base"), torch.float32, 0, quantization(adapter, torch.float32)
    ).eval()
    with torch.no_grad():
        before = base(ids).logits
        network, _ = add_adapter(base, adapter, seed=0)
        assert torch.equal(network.eval()(ids).logits, before)
