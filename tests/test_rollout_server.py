"""stage.rollout_server: answers from a server that speaks vLLM's protocol (tests/vllm_like.py), weights by path."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from vllm_like import VLLMLike

from posttrain.errors import ConfigError, TrainingError
from posttrain.models.adapters import add_adapter
from posttrain.models.embedded import DIRECTORY
from posttrain.rollout_server import refuse_unreadable

Run = Callable[..., Any]
PPO = (
    "stage=grpo", "data.train=embedded:prompts:60", "data.eval=embedded:prompts:20:held_out", "stage.rewards=[exact]",
    "stage.max_new_tokens=6", "stage.samples=4", "stage.epochs=1", "batch.size=4", "eval.generate=8", "eval.max_new_tokens=6",
    "train.steps=3", "optim.lr=1e-3", "run.dir=r",
)  # fmt: skip


@pytest.fixture
def server() -> Iterator[VLLMLike]:
    with VLLMLike(str(DIRECTORY)) as found:
        yield found


def told() -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in found if line["split"] == "train"]


@pytest.mark.parametrize(("adapter", "path"), [("none", "/collective_rpc"), ("lora", "/v1/load_lora_adapter")])
def test_a_server_writes_with_the_weights_of_each_iteration(
    run: Run, server: VLLMLike, adapter: str, path: str
) -> None:
    """Its log-probs are the training forward's, iteration after iteration: it has the weights that are about to learn."""
    run(*PPO, f"stage.rollout_server={server.url}", f"adapter={adapter}", "stage.advantage=gae")
    paths = [where for where, _ in server.seen]
    assert paths.count(path) == 5  # three iterations and two evaluations
    assert paths.count("/v1/completions") == 3 * 4 + 2 * 8
    assert all(paths[i + 1] == "/reset_prefix_cache" for i, where in enumerate(paths) if where == path)
    assert all(line["rollout_gap"] < 1e-4 for line in told())
    assert told()[-1]["ratio_deviation"] < 1e-5  # one epoch: each update begins where its answers were written


def test_every_sampling_setting_is_sent(run: Run, server: VLLMLike) -> None:
    run(*PPO, f"stage.rollout_server={server.url}", "train.steps=1", "stage.temperature=0.7")
    told = [body for where, body in server.seen if where == "/v1/completions" and body["n"] == 4]
    asked = told[0]
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (0.7, 1.0, -1, 0.0)
    assert asked["repetition_penalty"] == 1.0
    assert len({body["seed"] for body in told}) == len(told) == 4


def test_what_goes_wrong_there_is_told(run: Run, server: VLLMLike) -> None:
    with pytest.raises(ConfigError, match=r"stage\.rollout_server=http://127\.0\.0\.1:9 answers no GET /v1/models"):
        run(*PPO, "stage.rollout_server=http://127.0.0.1:9")
    server.fail_at = "/v1/completions"
    with pytest.raises(TrainingError, match=r"refused /v1/completions \(500\).*out of memory"):
        run(*PPO, f"stage.rollout_server={server.url}", "run.dir=s")


@pytest.mark.parametrize(
    ("adapter", "named"),
    [({"name": "bottleneck"}, "bottleneck"), ({"dora": True}, "use_dora"), ({"alphas": {"v_proj": 2}}, "alpha_p"), ({}, "")],
)  # fmt: skip
def test_what_came_by_a_path_is_looked_at_too(adapter: dict[str, Any], named: str) -> None:
    plain = {"name": "lora", "path": None, "targets": "qv", "rank": 2, "alpha": 4, "dropout": 0.0, "rslora": False, "dora": False,
             "ranks": {}, "alphas": {}, "placement": "both", "width": 4, "activation": "gelu"}  # fmt: skip
    chosen: Any = SimpleNamespace(**plain | adapter)
    network = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    model: Any = add_adapter(network, chosen, seed=0)[0]
    if not named:
        refuse_unreadable(model, network)
        return
    with pytest.raises(ConfigError, match=f"without DoRA, and this model has {named}"):
        refuse_unreadable(model, network)
