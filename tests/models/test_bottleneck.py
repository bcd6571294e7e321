"""Bottleneck adapters: on the right outputs in each family, nothing at step 0, saved, stacked, switched off."""

import copy
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, GROUPS, policy
from torch import Tensor, nn

from posttrain.data.batches import collate
from posttrain.errors import ModelError
from posttrain.models.adapters import add_adapter
from posttrain.models.bottleneck import Bottleneck, settle
from posttrain.models.policy import Policy
from posttrain.models.sublayers import _layers, find_sublayers

pytestmark = [pytest.mark.filterwarnings("ignore:.*mamba.*"), pytest.mark.filterwarnings("ignore:.*fast path.*")]
IDS = torch.arange(3, 20)[None]
OWN_RESIDUAL = {"opt", "openai-gpt", "rwkv", "minimax"}
"""Whose layers norm the residual stream itself (opt's post-norm variant, rwkv's first block)."""


def bottleneck(**changes: Any) -> Any:
    plain = {"name": "bottleneck", "path": None, "placement": "both", "width": 1, "activation": "gelu", "dropout": 0.0}
    return SimpleNamespace(**plain | changes)


def moved(network: Any, **changes: Any) -> Any:
    """With an adapter that has been trained: no weight of it is zero."""
    adapted, _ = add_adapter(network, bottleneck(**changes), seed=0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


def hooked(modules: list[nn.Module], hook: Any) -> Any:
    return [module.register_forward_hook(hook, with_kwargs=True) for module in modules]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_places_are_all_that_is_added_to_the_residual(family: str) -> None:
    """A layer whose places put out zeros passes on what it was given."""
    network = policy(family).network
    places = [network.get_submodule(name) for name in find_sublayers(network)]
    called: list[nn.Module] = []
    passed: list[bool] = []

    def zero(module: nn.Module, _: Any, __: Any, output: Any) -> Any:
        called.append(module)
        return torch.zeros_like(output) if isinstance(output, Tensor) else type(output)((output[0] * 0, *output[1:]))

    def compare(_: Any, inputs: Any, named: Any, output: Any) -> None:
        given = inputs[0] if inputs else named["hidden_states"]
        passed.append(torch.equal(given, output if isinstance(output, Tensor) else output[0]))

    handles = hooked(places, zero) + hooked(_layers(network), compare)
    network(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert sorted(map(id, called)) == sorted(map(id, places)), "each is called once"
    assert len(passed) == len(_layers(network))
    assert all(passed) or family in OWN_RESIDUAL


SEVERAL = ["llama", "gemma2", "gpt2", "gpt_neox", "falcon", "phi", "opt", "bloom", "openai-gpt", "dbrx", "mixtral",
           "granitemoehybrid", "mamba", "gemma3"]  # fmt: skip


@pytest.mark.parametrize("family", SEVERAL)
def test_step_0_is_the_same_to_the_bit_and_training_reaches_every_adapter(family: str) -> None:
    network = families.network(family)
    batch = collate(GROUPS, [[0], [1], [2]], "padded")
    with torch.no_grad():
        before = Policy(network).hidden(batch)
        adapted, _ = add_adapter(network, bottleneck(), seed=0)
        ours = Policy(adapted.eval())
        assert torch.equal(ours.hidden(batch), before)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * len(find_sublayers(network))
    ours(batch, weights=torch.ones(sum(g.trained_tokens for g in GROUPS))).objective.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (".up." in name), name  # what is behind zeros has no gradient yet
        parameter.data -= parameter.grad.sign() * 1e-3
    with torch.no_grad():
        assert not torch.equal(ours.hidden(batch), before)
        with adapted.disable_adapter():  # type: ignore[operator]
            assert torch.equal(ours.hidden(batch), before)


def by_hand(adapter: Bottleneck, h: Tensor) -> Tensor:
    """h + W_up·max(0, W_down·h + b_down) + b_up, a position at a time."""
    down, up = adapter.down, adapter.up
    rows = [up.weight @ (down.weight @ x + down.bias).clamp(min=0) + up.bias for x in h.flatten(0, -2)]
    return h + torch.stack(rows).view_as(h)


@pytest.mark.parametrize("placement", ["both", "ffn", "attention"])
@torch.no_grad()
def test_a_llama_layer_by_hand(placement: str) -> None:
    """x ← x + A(attention(norm x)); x ← x + F(mlp(norm x))."""
    adapted = moved(families.network("llama"), placement=placement, activation="relu")
    layer, plain = adapted.get_base_model().model.layers[0], families.network("llama").model
    seen: dict[str, Any] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    adapted(input_ids=IDS)
    x, own = seen["x"], plain.layers[0]
    given = {"position_embeddings": plain.rotary_emb(x, torch.arange(IDS.shape[1])[None]), "attention_mask": None}
    h = own.self_attn(own.input_layernorm(x), **given)[0]
    x = x + (by_hand(layer.self_attn.bottleneck.adapters["default"], h) if placement != "ffn" else h)
    h = own.mlp(own.post_attention_layernorm(x))
    x = x + (by_hand(layer.mlp.bottleneck.adapters["default"], h) if placement != "attention" else h)
    torch.testing.assert_close(seen["y"], x)
    assert float((plain.layers[0](seen["x"], **given) - x).abs().max()) > 0.1


@torch.no_grad()
def test_side_by_side_sublayers_have_one_each_before_their_sum() -> None:
    """phi: x ← x + A(attention(norm x)) + F(mlp(norm x))."""
    adapted = moved(families.network("phi"), activation="relu")
    layer, plain = adapted.get_base_model().model.layers[0], families.network("phi").model
    seen: dict[str, Any] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    adapted(input_ids=IDS)
    x, own = seen["x"], plain.layers[0]
    given = {"position_embeddings": plain.rotary_emb(x, torch.arange(IDS.shape[1])[None]), "attention_mask": None}
    normed = own.input_layernorm(x)
    attention = by_hand(layer.self_attn.bottleneck.adapters["default"], own.self_attn(normed, **given)[0])
    expected = x + attention + by_hand(layer.mlp.bottleneck.adapters["default"], own.mlp(normed))
    torch.testing.assert_close(seen["y"], expected)


def test_its_parameters_are_2dm_and_biases_and_stay_under_5_percent() -> None:
    """A llama of d = 32 in 2 layers, 4 places: at width m they are 4·(2·32·m + 32 + m)."""
    network = families.network("llama")
    base = sum(p.numel() for p in network.parameters())
    widest = max(m for m in range(1, 32) if 4 * (65 * m + 32) < 0.05 * (base + 4 * (65 * m + 32)))
    adapted, described = add_adapter(network, bottleneck(width=widest), seed=0)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 4 * (65 * widest + 32)
    assert described == f"bottleneck width {widest}, gelu on mlp, self_attn (4 modules)"
    with pytest.raises(ModelError, match=rf"has under 5%: the widest that fits is adapter\.width={widest}, or"):
        add_adapter(families.network("llama"), bottleneck(width=widest + 1), seed=0)
    with pytest.raises(ModelError, match=r"no width fits.*take adapter=lora"):
        add_adapter(families.network("llama", vocab_size=9, num_hidden_layers=8, intermediate_size=1), bottleneck(), 0)


def test_a_family_without_feed_forward_sublayers_is_told() -> None:
    with pytest.raises(ModelError, match=r"adapter\.placement=ffn, but the mamba architecture.*attention.*\(mixer"):
        add_adapter(families.network("mamba"), bottleneck(placement="ffn"), seed=0)


def test_a_layer_of_an_unknown_kind_is_told() -> None:
    network = families.network("llama")
    network.model.layers[1] = nn.ModuleDict({"gears": nn.Sequential(nn.Linear(2, 2))})
    with pytest.raises(ModelError, match=r"layer 1 of the llama architecture, which holds gears \(Sequential\)"):
        find_sublayers(network)


def test_a_copy_runs_its_own_and_recomputed_activations_give_the_same_gradients() -> None:
    adapted = moved(families.network("llama"))
    twin = copy.deepcopy(adapted)
    gradients = []
    for model in (adapted, twin):
        if model is twin:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(adapted(input_ids=IDS).logits, before)


@torch.no_grad()
def test_with_a_cache_it_computes_the_same() -> None:
    adapted = moved(families.network("llama"))
    start = adapted(input_ids=IDS[:, :9], use_cache=True)
    rest = adapted(input_ids=IDS[:, 9:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_on_top_of_one_in_place_is_switched_off_alone() -> None:
    first = moved(families.network("opt"))
    below = first(input_ids=IDS).logits
    network = settle(first)
    assert torch.equal(network(input_ids=IDS).logits, below)
    both = moved(network)
    assert not torch.equal(both(input_ids=IDS).logits, below)
    with both.disable_adapter():
        assert torch.equal(both(input_ids=IDS).logits, below)
    from posttrain.models.targets import find_targets

    names = find_targets(network, "all-linear")
    assert not [name for name in names if "bottleneck" in name or name.endswith("fc2")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fp32_weights_compute_in_the_runs_precision(dtype: torch.dtype) -> None:
    network = families.network("llama").to(torch.bfloat16)
    adapted = moved(network)
    layer = adapted.get_base_model().model.layers[0].mlp.bottleneck.adapters["default"]
    assert layer.down.weight.dtype == torch.float32
    seen = []
    layer.down.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert adapted(input_ids=IDS).logits.dtype == torch.bfloat16
    assert seen == [dtype]
