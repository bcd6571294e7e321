"""A run trained with an adapter is a model like any other: the adapter is folded into the weights below it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.errors import ModelError
from posttrain.models.lineage import lineage
from posttrain.models.reload import load_saved
from posttrain.records import read_records
from posttrain.tools.merge import merge

Run = Callable[..., Any]
ADAPTER = ["adapter=lora", "adapter.targets=all-linear", "optim.lr=1e-2"]
PAIRS = ["data.train=embedded:pairs:80", "data.eval=embedded:pairs:20:held_out"]


def test_the_next_run_starts_where_the_adapters_run_ended(run: Run) -> None:
    first = run(*ADAPTER, "run.dir=a")
    assert abs(first.metrics["nll"]["value"] - first.start["nll"]["value"]) > 0.01
    for name, options in {"whole": [], "on top": ["adapter=lora"]}.items():
        second = run("model.path=a", *options, f"run.dir={name}", "train.steps=1")
        assert second.start["nll"]["value"] == pytest.approx(first.metrics["nll"]["value"], rel=1e-5)


def test_an_adapter_on_an_adapter_is_saved_with_both_below_it(run: Run) -> None:
    run(*ADAPTER, "run.dir=a")
    second = run(*ADAPTER, "model.path=a", "run.dir=b")
    assert lineage("b/model")[1] == [os.path.abspath("a/model"), "b/model"]
    third = run("model.path=b", "run.dir=c", "train.steps=1")
    assert third.start["nll"]["value"] == pytest.approx(second.metrics["nll"]["value"], rel=1e-5)
    merge(["b", "merged"])
    probe = torch.arange(8).unsqueeze(0) + 5
    with torch.no_grad():
        stacked, whole = load_saved("b")[0](probe).logits, load_saved("merged")[0](probe).logits
    torch.testing.assert_close(stacked, whole, rtol=0, atol=1e-4)


def test_a_reward_model_from_an_adapters_run(run: Run) -> None:
    """Its states are those of the merged model: the first step's gradient, all in the zero score layer, is the same."""
    run(*ADAPTER, "run.dir=a")
    merge(["a", "merged"])
    for name in ("a", "merged"):
        run("stage=reward", *PAIRS, f"model.path={name}", f"run.dir=of-{name}", "train.steps=2", "optim.lr=1e-3")
    ours, expected = (read_records(Path(f"of-{name}/eval/step-000002.parquet"))[2] for name in ("a", "merged"))
    assert np.abs(expected["margin_sum"]).max() > 1e-3
    np.testing.assert_allclose(ours["margin_sum"], expected["margin_sum"], atol=1e-5)


def test_a_reward_models_adapter_goes_on_with_its_scores_and_pooling(run: Run) -> None:
    reward = ["stage=reward", *PAIRS, "stage.pooling=mean"]
    first = run(*reward, *ADAPTER, "run.dir=a")
    second = run(*reward, "model.path=a", "run.dir=b", "train.steps=1")
    assert second.start["nll"]["value"] == pytest.approx(first.metrics["nll"]["value"], rel=1e-5)
    with pytest.raises(ModelError, match=r"set stage\.pooling=mean"):
        run("stage=reward", *PAIRS, "model.path=a", "run.dir=c")


@pytest.mark.parametrize("options", [[], ["adapter=lora"]])
def test_a_reward_model_is_no_policy(run: Run, options: list[str]) -> None:
    run("stage=reward", *PAIRS, *options, "run.dir=r", "train.steps=1")
    with pytest.raises(ModelError, match="is a reward model"):
        run("stage=dpo", *PAIRS, "model.path=r", "run.dir=d")


def test_four_bits_are_not_folded_into(run: Run) -> None:
    run(*ADAPTER, "run.dir=a", "train.steps=1")
    with pytest.raises(ModelError, match=r"adapter=qlora.*posttrain merge.*adapter\.path=a/model"):
        run("model.path=a", "adapter=qlora", "run.dir=b")


def test_an_adapter_of_another_model_is_refused(run: Run) -> None:
    run(*ADAPTER, "run.dir=a", "train.steps=1")
    config = Path("a/model/adapter_config.json")
    made = json.loads(config.read_text())
    config.write_text(json.dumps(made | {"r": 4}))
    with pytest.raises(ModelError, match=r"the adapter a/model does not fit"):
        run("model.path=a", "run.dir=b")


def test_a_base_that_has_moved_is_told(run: Run) -> None:
    run(*ADAPTER, "run.dir=a", "train.steps=1")
    run("model.path=a", *ADAPTER, "run.dir=b", "train.steps=1")
    Path("a").rename("elsewhere")
    with pytest.raises(
        ModelError,
        match=r"the adapter b/model is of the model at \S*/a/model, which cannot be read .*does not exist.*; put it there",
    ):
        run("model.path=b", "run.dir=c")
