"""Each architecture family: our numbers are its own, in every layout that it can do; what it cannot is refused by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import APART, FAMILIES, GROUPS, PACKS, REFUSED, own_logprobs, policy
from transformers import AutoTokenizer

from posttrain.data.batches import collate
from posttrain.errors import ModelError
from posttrain.models import embedded
from posttrain.models.policy import Policy
from posttrain.models.probe import TOLERANCE, check_forward, probe_positions, sliding_window

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*mamba.*"),
    pytest.mark.filterwarnings("ignore:.*fast path.*"),
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logprobs_are_the_models_own_whatever_the_padding(family: str) -> None:
    network = policy(family).network
    own = torch.cat([own_logprobs(network, example) for example in GROUPS])
    for extra in (0, 7):
        batch = collate(GROUPS, [[0], [1], [2]], "padded", extra_padding=extra)
        ours = policy(family)(batch, statistics=True)
        torch.testing.assert_close(ours.logprobs, own, rtol=0, atol=1e-4)
        objective = policy(family)(batch, weights=torch.ones(len(own))).objective
        torch.testing.assert_close(objective, -own.sum(), rtol=1e-5, atol=1e-4)
    noise = replace(batch, input_ids=torch.where(batch.segments < 0, 50, batch.input_ids))
    torch.testing.assert_close(policy(family)(noise).logprobs, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", PACKS)
@torch.no_grad()
def test_packed_examples_are_as_if_alone(family: str) -> None:
    own = torch.cat([own_logprobs(policy(family).network, example) for example in GROUPS])
    batch = collate(GROUPS, [[0, 1, 2]], "packed")
    torch.testing.assert_close(policy(family)(batch).logprobs, own, rtol=0, atol=1e-4)
    found = check_forward(policy(family), GROUPS, "packed", CPU)
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("family", APART)
def test_packing_is_refused_by_name_and_padding_is_not(family: str) -> None:
    assert max(check_forward(policy(family), GROUPS, "padded", CPU).values()) < 1e-4
    kind = policy(family).network.config.model_type
    with pytest.raises(ModelError, match=rf"batch\.layout=packed.*{kind}.*batch\.layout=padded"):
        check_forward(policy(family), GROUPS, "packed", CPU)


def test_fresh_weights_that_hardly_mix_do_not_hide_a_leak() -> None:
    """At the library's own initialisation this one's log-probs move by less than the tolerance."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("jamba", **{**FAMILIES["jamba"], "initializer_range": 0.01})
    fresh = Policy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match="jamba lets examples that share a row see each other") as caught:
        check_forward(fresh, GROUPS, "packed", CPU)
    assert float(re.findall(r"differ by (\S+),", str(caught.value))[0]) < TOLERANCE


@pytest.mark.parametrize("family", REFUSED)
def test_what_does_not_fit_is_refused_by_name(family: str) -> None:
    reason = {"modernbert-decoder": "something to its logits", "doge": "the padding and the examples beside it"}
    with pytest.raises(ModelError, match=f"{family}.*{reason[family]}"):
        check_forward(policy(family), GROUPS, "padded", CPU)


def test_the_checks_see_a_cap_a_scale_and_a_window_that_are_missed() -> None:
    """Each family's feature changes its numbers, so that the agreement above says something."""
    for family in ("gemma2", "cohere", "granite", "falcon_h1", "minicpm3", "recurrent_gemma"):
        wrong = Policy(policy(family).network)
        wrong.transform = type(wrong.transform)()
        with pytest.raises(ModelError, match=f"{family}.*own by"):
            check_forward(wrong, GROUPS, "padded", CPU)


def test_the_probe_reaches_past_a_sliding_window() -> None:
    assert {name: sliding_window(policy(name).network) for name in ("mistral", "llama", "gemma3", "llama4_text")} == {
        "mistral": 8, "llama": None, "gemma3": 8, "llama4_text": 8}  # fmt: skip
    lengths = [30, 5, 9, 8, 7, 5000, 12]
    assert probe_positions(lengths, window=8) == [1, 4, 2]
    assert probe_positions(lengths, window=4500) == [1, 4, 5]
    assert probe_positions(lengths, window=9000) == [1, 4, 0]
    assert probe_positions(lengths) == [1, 4, 0]
    assert probe_positions([6]) == [0, 0, 0]


GRADIENTS = ["llama", "llama-tied-mqa", "gemma2", "cohere", "granite", "gpt2", "phi", "deepseek_v3", "mixtral", "bloom",
             "mamba", "qwen3_next", "falcon_h1", "opt"]  # fmt: skip


@pytest.mark.parametrize("family", GRADIENTS)
def test_gradients_are_those_of_plain_autograd(family: str) -> None:
    ours = Policy(families.network(family))
    weights = torch.linspace(0.5, 2.0, sum(g.trained_tokens for g in GROUPS))
    parameters = [p for p in ours.parameters() if p.requires_grad]
    objective = ours(collate(GROUPS, [[0], [1], [2]], "padded"), weights=weights).objective
    found = torch.autograd.grad(objective, parameters, allow_unused=True)
    own = torch.cat([own_logprobs(ours.network, example) for example in GROUPS])
    expected = torch.autograd.grad(-(weights * own).sum(), parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-5)


def saved(family: str) -> str:
    """A tiny model directory with the embedded tokenizer."""
    families.network(family).save_pretrained(family)
    AutoTokenizer.from_pretrained(embedded.DIRECTORY).save_pretrained(family)
    return str(Path(family).resolve())


TRAINED = ["llama", "gpt2", "mixtral", "bloom", "mamba", "qwen3_next", "deepseek_v3", "gemma3"]


@pytest.mark.parametrize("family", TRAINED)
def test_sft_trains_it_and_its_checkpoint_loads(run: Callable[..., Any], family: str) -> None:
    options = [f"model.path={saved(family)}", "train.steps=6", "optim.lr=1e-2", "schedule.warmup_steps=0"]
    summary = run(*options, "run.dir=run")
    assert summary.metrics["nll"]["value"] < summary.start["nll"]["value"] - 0.3
    if family in APART:
        with pytest.raises(ModelError, match=f"{family}"):
            run(*options, "batch.layout=packed", "run.dir=packed")
    else:
        packed = run(*options, "batch.layout=packed", "run.dir=packed")
        assert packed.metrics["nll"]["value"] == pytest.approx(summary.metrics["nll"]["value"], rel=1e-3)
