"""stage=ppo: what must hold whatever is learned, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_arguments
from safetensors.torch import load_file

from posttrain.config import resolve
from posttrain.data.tokens import TokenGroup
from posttrain.errors import DataError, UserError
from posttrain.models.embedded import DIRECTORY
from posttrain.models.logprobs import LogitTransform
from posttrain.models.token_logprobs import token_kl
from posttrain.stages.controls import Controls
from posttrain.stages.experience import Experience
from posttrain.stages.ppo import PPO as PPO_STAGE
from posttrain.tools.evaluate import evaluate

Run = Callable[..., Any]
PPO = (
    "stage=ppo", "data.train=embedded:prompts:60", "data.eval=embedded:prompts:20:held_out", "stage.rewards=[exact]",
    "stage.max_new_tokens=6", "stage.samples=4", "stage.epochs=2", "batch.size=6", "eval.generate=20", "eval.verifier=exact",
    "eval.max_new_tokens=6", "train.steps=4",
)  # fmt: skip


def lines(run: str, split: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in found if line["split"] == split]


@pytest.mark.parametrize("advantage", ["gae", "group", "leave_one_out", "return"])
def test_a_policy_that_does_not_move_has_ratio_one(run: Run, advantage: str) -> None:
    """lr 1e-30: in every epoch the ratio is 1, nothing is clipped, KL(old || new) is 0; KL to the reference is 0."""
    run(*PPO, f"stage.advantage={advantage}", "optim.lr=1e-30", "stage.minibatches=2", "train.steps=8", "run.dir=r")
    for line in lines("r"):
        assert line["ratio_deviation"] < 1e-5
        assert line["clip_fraction"] == 0
        assert abs(line["approx_kl"]) < 1e-9
        assert abs(line["kl"]) < 1e-9


def test_the_first_update_has_ratio_one_and_the_next_has_not(run: Run) -> None:
    run(*PPO, "run.dir=r", "optim.lr=1e-3")
    first, second, *_ = lines("r")
    assert first["ratio_deviation"] < 1e-5
    assert second["ratio_deviation"] > 1e-4
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert lines("r")[2]["kl"] != 0


@pytest.mark.parametrize("split", [("batch.micro_tokens=1",), ("batch.micro_size=3",), ("batch.layout=packed",)])
def test_the_split_into_forwards_changes_nothing(run: Run, split: tuple[str, ...]) -> None:
    options = (
        *PPO,
        "optim.lr=1e-4",
        "stage.advantage=gae",
        "stage.kl_in=both",
        "stage.entropy_weight=0.01",
        "stage.minibatches=2",
    )
    run(*options, "run.dir=a", "train.steps=4")
    run(*options, *split, "run.dir=b", "train.steps=4")
    for a, b in zip(lines("a"), lines("b"), strict=True):
        for name in ("loss", "grad_norm", "approx_kl", "kl", "entropy", "explained_variance"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-6), name


def test_rewards_that_fail_take_no_part_and_too_many_stop_the_run(run: Run) -> None:
    Path("shaky.py").write_text(
        "def reward(prompts, responses, rows):\n"
        "    return [None if i % 3 == 0 else float(r == row['answer']) for i, (r, row) in enumerate(zip(responses, rows))]\n"
        "def broken(prompts, responses, rows):\n    raise ValueError('no')\n"
    )
    run(*PPO, "stage.rewards=[shaky:reward]", "run.dir=r")
    assert lines("r")[0]["reward_failed"] == pytest.approx(1 / 3)
    assert lines("r", "eval")[0]["reward"]["n"] < 20
    with pytest.raises(
        DataError, match=r"20 of 20 responses could not be rewarded.*shaky:broken raised ValueError: no"
    ):
        run(*PPO, "stage.rewards=[shaky:broken]", "run.dir=s")


def test_a_reward_function_that_hangs_and_one_that_dies_are_survived(run: Run) -> None:
    """Their answers count as failed, and the next iteration is rewarded again."""
    Path("moody.py").write_text(
        "import os, pathlib, time\n"
        "def reward(prompts, responses, rows):\n"
        "    calls = pathlib.Path('calls'); calls.touch(); n = len(calls.read_text()); calls.write_text('x' * (n + 1))\n"
        "    if n == 2: time.sleep(100)\n"
        "    if n == 3: os._exit(1)\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    run(*PPO, "stage.rewards=[moody:reward]", "stage.reward_seconds=3", "stage.max_failed_fraction=1", "stage.epochs=1",
        "train.eval_every=9", "train.steps=3", "run.dir=r")  # fmt: skip
    assert [line["reward_failed"] for line in lines("r")] == [1.0, 1.0, 0.0]  # the first evaluation asks twice
    assert lines("r")[0]["reward"]["value"] is None
    assert lines("r")[2]["reward"]["n"] == 6


def test_answers_that_are_all_equally_good_teach_nothing_and_stop_nothing(run: Run) -> None:
    """The first iterations of a hard task: no advantage, so no gradient."""
    run(*PPO, "stage=grpo", "stage.beta=0", "stage.rewards=['regex:never this']", "run.dir=r")
    assert lines("r")[0]["reward"]["value"] == 0
    assert [line["grad_norm"] for line in lines("r")] == [0.0] * 4
    start, end = load_file(DIRECTORY / "model.safetensors"), load_file("r/model/model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_every_score_has_an_interval(run: Run) -> None:
    summary = run(*PPO, "run.dir=r")
    for score in (lines("r")[0]["reward"], lines("r", "eval")[0]["reward"], lines("r", "eval")[0]["accuracy"]):
        assert score["low"] <= score["value"] <= score["high"]
    assert lines("r")[0]["reward"]["clusters"] == 6  # prompts, not answers
    assert {"reward", "accuracy"} <= set(summary.changes)


@pytest.mark.parametrize("filters", [("stage.top_p=0.8",), ("stage.top_k=3",), ("stage.top_k=5", "stage.top_p=0.9")])
def test_what_was_left_out_of_the_draw_is_left_out_of_the_ratio(run: Run, filters: tuple[str, ...]) -> None:
    """Old and new are of the distribution that was drawn from (trl#6789); the KL to the reference is of the whole one."""
    run(*PPO, *filters, "stage.minibatches=2", "batch.layout=shared", "optim.lr=1e-30", "run.dir=r")
    for line in lines("r"):
        assert line["rollout_gap"] < 1e-5
        assert line["ratio_deviation"] < 1e-5
        assert abs(line["kl"]) < 1e-9
    run(*PPO, *filters, "stage.kl_in=both", "optim.lr=1e-3", "run.dir=s")
    assert lines("s")[0]["ratio_deviation"] < 1e-5
    assert lines("s")[1]["ratio_deviation"] > 1e-4


def test_the_largest_ratio_is_told(run: Run) -> None:
    run(*PPO, "run.dir=r", "optim.lr=1e-3", "train.log_every=2")
    for line in lines("r"):
        assert line["ratio_max"] > 1 + line["ratio_deviation"]


def test_token_minibatches_part_all_token_steps() -> None:
    """Each epoch's steps train every token of every response once, whatever is merged for the shared layout."""
    stage = PPO_STAGE(minibatches=3, minibatch="token", epochs=2, samples=2)
    lived = experience([3, 1, 4, 2])
    for layout in ("padded", "shared"):
        steps = list(stage.minibatches_of(lived, layout, seed=0, iteration=0))
        assert len(steps) == 6
        for epoch in (steps[:3], steps[3:]):
            assert sorted(v for groups in epoch for g in groups for v in g.tokens["number"]) == list(range(10))
            for group in (g for groups in epoch for g in groups):
                trained = [
                    t
                    for r, m in zip(group.responses, group.masks, strict=True)
                    for t, on in zip(r, m, strict=True)
                    if on
                ]
                assert trained == [100 + n for n in group.tokens["number"]]  # each number still beside its own token


def test_shared_minibatches_hold_a_prompts_answers_together() -> None:
    stage = PPO_STAGE(samples=2)
    (groups,) = list(stage.minibatches_of(experience([3, 1, 4, 2]), "shared", seed=0, iteration=0))[:1]
    assert sorted(group.count for group in groups) == [2, 2]
    assert {tuple(group.prompt) for group in groups} == {(0,), (1,)}


def test_running_normalisation_is_that_of_all_rewards_so_far() -> None:
    controls = Controls(beta=0.0)
    first, second = torch.tensor([1.0, 2.0, float("nan"), 4.0]).double(), torch.tensor([-3.0, 0.5]).double()
    controls.normalised(first)
    found = controls.normalised(second)
    everything = np.array([1.0, 2.0, 4.0, -3.0, 0.5])
    assert found.tolist() == pytest.approx(((second.numpy() - everything.mean()) / everything.std(ddof=1)).tolist())


def test_while_it_warms_up_the_critic_alone_learns(run: Run) -> None:
    """Its policy is the start's to the bit, its head is not 0; then the policy moves too."""
    run(*PPO, "stage.critic_warmup=1", "stage.entropy_weight=0.1", "stage.kl_in=both", "train.steps=2", "train.save_every=2",
        "optim.lr=1e-2", "optim.weight_decay=0.1", "run.dir=r")  # fmt: skip
    start, end = load_file(DIRECTORY / "model.safetensors"), load_file("r/model/model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert load_file("r/model/critic/value_head.safetensors")["weight"].abs().max() > 0
    run(*PPO, "stage.critic_warmup=1", "train.steps=4", "optim.lr=1e-2", "run.dir=s")
    assert any(not torch.equal(start[name], t) for name, t in load_file("s/model/model.safetensors").items())


def test_a_critic_of_its_own(run: Run) -> None:
    """Begun from a reward model with its score, saved beside the policy; the policy's trunk has no gradient from it."""
    pairs = ("data.train=embedded:pairs:100", "data.eval=embedded:pairs:20:held_out")
    reward = run("stage=reward", *pairs, "train.steps=2", "optim.lr=1e-2", "run.dir=reward").model_dir
    run(*PPO, f"model.critic={reward}", "train.steps=2", "optim.lr=1e-30", "run.dir=r")
    scores = load_file("r/model/critic/model.safetensors")["score.weight"]
    assert torch.equal(scores, load_file(f"{reward}/model.safetensors")["score.weight"])
    assert lines("r")[0]["explained_variance"] != pytest.approx(0, abs=1e-6)  # it values states from the first
    run(*PPO, f"model.critic={reward}", "stage.critic_warmup=9", "train.steps=2", "optim.lr=1e-2", "run.dir=s")
    start, end = load_file(DIRECTORY / "model.safetensors"), load_file("s/model/model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert not torch.equal(scores, load_file("s/model/critic/model.safetensors")["score.weight"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model.critic=embedded", "stage.advantage=group"), "has no critic as it is set"),
        (("model.critic=nowhere",), "model.critic=nowhere"),
        (("stage.critic_warmup=1", "stage.advantage=return"), "has no critic"),
        (("stage.kl_estimator=full",), "of the KL in the loss"),
        (("model.frozen_device=cpu", "adapter=lora"), "the policy without its adapter, so there is nothing to move"),
        (("model.frozen_device=cpu", "distribution=fsdp"), "the reference lies in parts on the ranks"),
        (("model.frozen_device=offload", "stage.beta=0"), "nothing stays beside the policy"),
        (("model.frozen_device=cpu", "stage.kl_in=loss", "stage.kl_estimator=full"), "in every step"),
        (("stage.top_p=0.9", "stage.rollout_server=http://127.0.0.1:9"), "does not say which tokens"),
    ],
)
def test_settings_that_cannot_be(run: Run, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(*PPO, *options, "run.dir=r")


def test_the_full_kl_is_the_one_over_the_vocabulary() -> None:
    """Against the library's, its gradient too; and 0 to itself."""
    torch.manual_seed(0)
    policy, other = (
        SimpleNamespace(head=torch.nn.Linear(8, 50, bias=False), transform=LogitTransform(softcap=3.0)) for _ in "ab"
    )
    hidden, there = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)

    def distribution(states: torch.Tensor, of: Any) -> torch.Tensor:
        return (3 * torch.tanh(of.head(states) / 3) / 0.7).log_softmax(-1)

    found = token_kl(hidden, there, policy, lambda: nullcontext(other), temperature=0.7)
    expected = torch.nn.functional.kl_div(
        distribution(there, other), distribution(hidden, policy), reduction="none", log_target=True
    )
    torch.testing.assert_close(found, expected.sum(-1))
    grads = [torch.autograd.grad(kl.square().sum(), [hidden, policy.head.weight]) for kl in (found, expected.sum(-1))]
    torch.testing.assert_close(*grads)
    assert token_kl(hidden, hidden, policy, lambda: nullcontext(policy), 1.0).abs().max() < 1e-6


def experience(lengths: list[int]) -> Experience:
    """Two answers to each prompt; token n of all is 100 + n, and so is numbered."""
    groups, first = [], 0
    for i, length in enumerate(lengths):
        numbers = np.arange(first, first + length)
        groups.append(
            TokenGroup(f"{i}", f"{i // 2}", [i // 2], [(100 + numbers).tolist()], [[True] * length], [0], [0], "{}",
                       tokens={"number": numbers})
        )  # fmt: skip
        first += length
    none = torch.zeros(len(lengths), max(lengths))
    texts = [""] * len(lengths)
    return Experience(groups, none, none, none, none, none, none[:, 0], {}, none[:, 0].bool(), samples=2, texts=texts)


def test_a_value_head_goes_on_with_the_next_run(run: Run) -> None:
    first = run(*PPO, "optim.lr=1e-2", "run.dir=r")
    head = load_file("r/model/critic/value_head.safetensors")["weight"]
    run(*PPO, f"model.path={first.run_dir}", "optim.lr=1e-30", "train.steps=2", "run.dir=s")
    assert head.any()
    assert torch.equal(load_file("s/model/critic/value_head.safetensors")["weight"], head)


@pytest.mark.parametrize("options", [("data.eval=", "data.eval_fraction=0"), ("eval.generate=0",)])
def test_without_anything_held_out(run: Run, options: tuple[str, ...]) -> None:
    assert run(*PPO, *options, "eval.verifier=none", "run.dir=r").steps == 4


@pytest.mark.parametrize("where", ["offload", "cpu"])
def test_where_the_frozen_networks_stay_changes_nothing(run: Run, where: str) -> None:
    run(
        "stage=reward",
        "data.train=embedded:pairs:40",
        "data.eval=embedded:pairs:8:held_out",
        "train.steps=2",
        "run.dir=scorer",
    )
    options = (*PPO, "stage.rewards=[model]", "model.reward=scorer", "optim.lr=1e-3")
    run(*options, "run.dir=a")
    run(*options, f"model.frozen_device={where}", "run.dir=b")
    for a, b in zip(lines("a"), lines("b"), strict=True):
        assert [a[name] for name in ("loss", "kl", "grad_norm")] == [b[name] for name in ("loss", "kl", "grad_norm")]


def test_the_last_iterations_rollouts_can_be_looked_at(run: Run) -> None:
    """Beside the held-out answers; each with its rewards, recomputed here, in the order in which they were sampled."""
    run(*PPO, "stage.rewards=[exact,length:4]", "stage.reward_weights=[1,0.5]", "train.steps=8", "run.dir=r")
    rows = [json.loads(line) for line in Path("r/samples.jsonl").read_text().splitlines()]
    held_out, rollouts = (rows[:20], rows[20:])
    assert all("before" in row for row in held_out)
    assert [len(row["rollouts"]) for row in rollouts] == [4] * 4
    assert {row["iteration"] for row in rollouts} == {3}
    rewards = [one for row in rollouts for one in row["rollouts"]]
    assert all(
        one["reward"] == pytest.approx(one["rewards"]["exact"] + 0.5 * one["rewards"]["length:4"]) for one in rewards
    )
    for row in rollouts:
        first, _, second = row["prompt"].removesuffix("=").partition("+" if "+" in row["prompt"] else "-")
        right = int(first) + int(second) if "+" in row["prompt"] else int(first) - int(second)
        for one in row["rollouts"]:
            assert one["rewards"]["exact"] == (one["answer"].strip() == str(right)), (row["prompt"], one)


def test_the_update_is_timed(run: Run) -> None:
    run(*PPO, "train.log_every=2", "run.dir=r")
    for line in lines("r"):
        assert line["update_seconds"] > 0
        assert line["update_tokens_per_second"] > 0


def test_eval_samples_too_and_measures_the_way_from_a_reference(run: Run) -> None:
    """The trained policy's held-out scores are those of the run that trained it."""
    trained = run(*PPO, "optim.lr=3e-3", "run.dir=r")

    def scores(*overrides: str) -> Any:
        return evaluate(resolve(small_arguments(*PPO, "model.path=r", *overrides), "eval")).metrics

    again = scores("model.reference=embedded", "run.dir=s")
    for name in ("reward", "reward_sampled", "kl"):
        assert again[name]["value"] == pytest.approx(trained.metrics[name]["value"], abs=1e-5), name
    assert trained.metrics["kl"]["value"] > 0.1
    assert "kl" not in scores("run.dir=t")


def test_without_a_reference_there_is_no_kl_to_tell(run: Run) -> None:
    run(*PPO, "stage.beta=0", "run.dir=r")
    assert all("kl" not in line for line in lines("r"))
    rows = [json.loads(line) for line in Path("r/samples.jsonl").read_text().splitlines()]
    assert {one["kl"] for row in rows for one in row.get("rollouts", ())} == {None}


def test_rewards_while_training_have_the_intervals_asked_for(run: Run) -> None:
    for level in (0.5, 0.95):
        run(*PPO, f"eval.confidence_level={level}", "train.steps=2", f"run.dir=r{level}")
    narrow, wide = (lines(f"r{level}")[0]["reward"] for level in (0.5, 0.95))
    assert narrow["value"] == wide["value"]
    assert narrow["high"] - narrow["low"] < 0.6 * (wide["high"] - wide["low"])
