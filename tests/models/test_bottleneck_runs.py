"""Runs with a bottleneck adapter: what is saved is what is loaded, by every way of loading it."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.errors import ConfigError, ModelError
from posttrain.models.bottleneck import Bottleneck
from posttrain.models.lineage import lineage
from posttrain.models.reload import load_saved
from posttrain.tools.merge import merge

Run = Callable[..., Any]
ADAPTER = ["adapter=bottleneck", "adapter.width=8", "optim.lr=1e-2"]
PAIRS = ["data.train=embedded:pairs:80", "data.eval=embedded:pairs:20:held_out"]
PROMPTS = ["data.train=embedded:prompts:40", "data.eval=embedded:prompts:20:held_out", "stage.max_new_tokens=4",
           "stage.samples=2", "eval.generate=4", "eval.max_new_tokens=4"]  # fmt: skip
PROBE = torch.arange(8).unsqueeze(0) + 5


@torch.no_grad()
def logits(path: str) -> torch.Tensor:
    found: torch.Tensor = load_saved(path)[0](PROBE).logits
    return found


def nll(summary: Any, when: str = "metrics") -> float:
    return float(getattr(summary, when)["nll"]["value"])


def test_it_is_loaded_as_it_was_saved_and_more_comes_on_top(run: Run) -> None:
    answered = ["eval.generate=5", "eval.max_new_tokens=4"]
    first = run(*ADAPTER, *answered, "run.dir=a")
    assert abs(nll(first) - nll(first, "start")) > 0.01
    for name, options in {
        "itself": ["adapter=bottleneck", "adapter.path=a/model", *answered],
        "lora": ["model.path=a", "adapter=lora"],
        "again": ["model.path=a", *ADAPTER, *answered],
    }.items():
        second = run(*options, f"run.dir={name}", "train.steps=2")
        assert nll(second, "start") == pytest.approx(nll(first), rel=1e-5), name
        assert nll(second) != nll(second, "start")
    assert lineage("again/model")[1] == [os.path.abspath("a/model"), "again/model"]
    model, tokenizer = load_saved("again")
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == 16
    assert tokenizer.decode(model.generate(PROBE, max_new_tokens=3, do_sample=False)[0])
    third = run("model.path=again", "adapter=lora", "run.dir=third", "train.steps=1")
    assert nll(third, "start") == pytest.approx(nll(second), rel=1e-5)
    for path in ("a", "lora", "again"):
        with pytest.raises(ModelError, match=r"a/model is a bottleneck adapter.*cannot be merged"):
            merge([path, "merged"])
    with pytest.raises(
        ModelError, match=r"rests on the bottleneck adapter again/model.*model.path=\S*/a/model adapter=bott"
    ):
        run("model.path=again", "run.dir=b")
    with pytest.raises(ModelError, match=r"model\.path=a is an adapter.*4-bit.*take adapter=lora"):
        run("model.path=a", "adapter=qlora", "run.dir=b")
    with pytest.raises(
        ModelError, match=r"adapter\.path=a/model is a BOTTLENECK adapter, but adapter=lora; set adapter=bo"
    ):
        run("adapter=lora", "adapter.path=a/model", "run.dir=b")


def test_the_reference_of_a_fresh_one_is_the_policy_without_it(run: Run) -> None:
    """dpo: stored log-probs; ppo: its adapter switched off while it samples."""
    base = run("stage=dpo", *PAIRS, "run.dir=plain", "train.steps=1", "optim.lr=1e-9")
    dpo = run("stage=dpo", *PAIRS, *ADAPTER, "run.dir=dpo")
    for name in ("margin", "kl"):
        assert dpo.start[name]["value"] == 0.0, name
        assert dpo.metrics[name]["value"] != 0.0, name
    assert dpo.start["logprob_chosen"]["value"] == base.start["logprob_chosen"]["value"]
    ppo = run("stage=ppo", *PROMPTS, "stage.rewards=[exact]", *ADAPTER, "run.dir=ppo")
    assert ppo.start["kl"]["value"] == 0.0
    assert ppo.metrics["kl"]["value"] != 0.0
    on = run("stage=ppo", *PROMPTS, "stage.rewards=[exact]", "adapter=bottleneck", "adapter.path=ppo/model",
             "model.reference=embedded", "run.dir=on", "train.steps=1")  # fmt: skip
    assert on.start["kl"]["value"] == pytest.approx(ppo.metrics["kl"]["value"], rel=1e-4)
    assert load_saved("ppo")[0].generate(PROBE, max_new_tokens=3, do_sample=False).shape == (1, 11)
    assert not torch.equal(logits("ppo"), logits("plain"))


def test_a_reward_models_score_layer_comes_with_it(run: Run) -> None:
    reward = ["stage=reward", *PAIRS]
    first = run(*reward, *ADAPTER, "run.dir=r")
    second = run(*reward, "adapter=bottleneck", "adapter.path=r/model", "run.dir=s", "train.steps=1")
    assert nll(second, "start") == pytest.approx(nll(first), rel=1e-5)
    model, tokenizer = load_saved("r")
    assert model.get_base_model().score.modules_to_save["default"].weight.abs().max() > 0
    run("stage=grpo", *PROMPTS, "stage.rewards=[model]", "model.reward=r", "run.dir=g", "train.steps=1")
    with pytest.raises(
        ModelError, match=r"model\.critic=r rests on the bottleneck adapter r/model.*give another model"
    ):
        run("stage=ppo", *PROMPTS, "stage.rewards=[exact]", "model.critic=r", "run.dir=c")
    assert tokenizer.pad_token_id is not None


def test_a_server_that_cannot_read_it_is_not_given_it(run: Run) -> None:
    server = ["stage=grpo", *PROMPTS, "stage.rewards=[exact]", "stage.rollout_server=http://127.0.0.1:9", "run.dir=s"]
    for options, named in {
        ("adapter=bottleneck",): "adapter=bottleneck",
        ("adapter=lora", "adapter.dora=true"): r"adapter\.dora",
        ("adapter=lora", "adapter.ranks.q_proj=2"): r"adapter\.ranks",
    }.items():
        with pytest.raises(ConfigError, match=rf"stage\.rollout_server=.*so not {named};"):
            run(*server, *options)


def test_dora_is_merged_as_it_is(run: Run) -> None:
    first = run("adapter=lora", "adapter.dora=true", "adapter.targets=all-linear", "adapter.ranks.q_proj=3", "optim.lr=1e-2",
        "run.dir=a")  # fmt: skip
    merge(["a", "merged"])
    torch.testing.assert_close(logits("a"), logits("merged"), rtol=0, atol=1e-4)
    merged = run("model.path=merged", "run.dir=b", "train.steps=1")
    assert nll(merged, "start") == pytest.approx(nll(first), rel=1e-5)
