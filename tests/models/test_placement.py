"""Where a network that does not train is kept."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models import placement


@pytest.fixture
def network() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def places(network: LlamaForCausalLM) -> list[int]:
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


def test_what_is_offloaded_is_copied_for_each_use_and_its_own_again_after_an_error_too(
    network: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy on the same device stands for one on a GPU here; test_on_a_gpu has the real thing."""
    monkeypatch.setattr(placement, "_copied", lambda tensor, device: tensor.clone())
    before, homes = copy.deepcopy(network.state_dict()), places(network)
    kept = placement.Kept(network, "offload", torch.device("cpu"))

    def fails() -> None:
        with kept() as used:
            assert not set(places(used)) & set(homes)
            assert used.lm_head.weight is used.model.embed_tokens.weight  # tied weights are copied once
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert places(network) == homes
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("where", ["offload", "cpu"])
def test_on_a_gpu(network: LlamaForCausalLM, where: str) -> None:
    ids = torch.arange(12)[None]
    expected = network.eval()(ids).logits
    kept = placement.Kept(network, where, torch.device("cuda"))  # type: ignore[arg-type]
    with kept() as used:
        torch.testing.assert_close(used(ids.to(kept.device)).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert all(p.device.type == "cpu" for p in network.parameters())
