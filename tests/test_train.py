"""The loop end to end on the embedded model: numbers do not depend on how the work is split, and a run can stop and go on."""

import copy
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import long_but, small_arguments
from safetensors.torch import load_file

Run = Callable[..., Any]
VARYING = {"tokens_per_second", "peak_memory_bytes", "rollout_seconds", "reward_seconds", "score_seconds",
           "rollout_tokens_per_second", "score_tokens_per_second"}  # fmt: skip


def log(run_dir: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from machine to machine."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time_s")
        line["metrics"] = {k: v for k, v in line["metrics"].items() if k not in VARYING}
    return lines


def losses(run_dir: str | Path) -> list[float]:
    return [line["metrics"]["loss"] for line in log(run_dir) if line["split"] == "train"]


def norms(run_dir: str | Path) -> list[float]:
    return [line["metrics"]["grad_norm"] for line in log(run_dir) if line["split"] == "train"]


def weights(run_dir: str | Path) -> dict[str, torch.Tensor]:
    found = list((Path(run_dir) / "model").glob("*.safetensors"))
    return {name: tensor for path in found for name, tensor in load_file(path).items()}


def assert_same_weights(a: str | Path, b: str | Path, atol: float) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol)


SPLITS = {
    "8x1": ["batch.micro_size=1"],
    "small budget": ["batch.micro_tokens=24"],
    "packed": ["batch.layout=packed"],
    "packed, two forwards": ["batch.layout=packed", "batch.micro_size=4"],
    "shared": ["batch.layout=shared"],
    "shared, two forwards": ["batch.layout=shared", "batch.micro_size=4"],
}
BROAD = ("8x1", "packed, two forwards", "shared, two forwards")
"""For stages that another one resembles."""
PAIRS = ["data.train=embedded:pairs:200", "data.eval=embedded:pairs:20:held_out"]
GROUPS = ["data.train=embedded:groups:200", "data.eval=embedded:groups:20:held_out"]
SAMPLED = ["data.train=embedded:prompts:200", "data.eval=embedded:prompts:20:held_out", "stage.rewards=[exact]",
           "stage.samples=3", "stage.max_new_tokens=4", "eval.generate=20", "eval.max_new_tokens=4"]  # fmt: skip
STEADY = ["optim.lr=1e-3", "optim.eps=0.1", "train.steps=10", "train.save_every=5",
          "data.eval=embedded:prompt_completion:20:held_out"]  # fmt: skip
"""AdamW's first steps divide each gradient by its own size, and so make of rounding whole steps; a large eps does not."""
SLOW = ["optim.lr=3e-4"]
"""At more these losses, sums of terms that cancel, leave the neighbourhood of the reference and magnify rounding."""
STAGES = {
    "sft": [],
    "sft by sequence": ["stage.normalize=sequence"],
    "sft smoothed": ["stage.label_smoothing=0.1"],
    "lora": ["stage=lora", "optim.lr=1e-3"],
    "bottleneck": ["adapter=bottleneck", "adapter.width=8", "optim.lr=1e-3"],
    "pretrain": ["stage=pretrain", "data.train=embedded:text:200", "data.eval=embedded:text:20:held_out"],
    "dpo": ["stage=dpo", *PAIRS],
    "dpo lora": ["stage=dpo", "adapter=lora", *PAIRS],
    "ipo of groups": ["stage=dpo", "stage.link=squared", *GROUPS],
    "orpo": ["stage=dpo", "stage.link=odds_ratio", "stage.nll_weight=1", *PAIRS],
    "gpro": ["stage=gpro", *GROUPS, *SLOW],
    "gpro dual": ["stage=gpro", "stage.form=dual", *GROUPS, *SLOW],
    "reward": ["stage=reward", *PAIRS],
    "reward of groups": ["stage=reward", "stage.objective=plackett_luce", "stage.pooling=mean", *GROUPS],
    "ppo": [
        "stage=ppo",
        *SAMPLED,
        "stage.minibatches=2",
        "stage.kl_in=both",
        "stage.entropy_weight=0.01",
        "optim.lr=3e-3",
    ],
    "grpo": ["stage=grpo", *SAMPLED, "stage.minibatch=token", "stage.kl_estimator=full", "optim.lr=3e-3"],
    "mixture": ["model.path=mixture", "model.init=config", "stage.aux_weight=0.1"],
}
"""What must not depend on how the work is split, nor on padding or ranks (tests/test_ranks.py). A new stage joins here."""
EVERY_SPLIT = ("sft", "pretrain", "dpo", "gpro", "ppo")
LOSSES, WEIGHTS, SCORES = 1e-5, 1e-6, 1e-6
"""Tolerances: relative (near zero absolute, for the terms of a loss may cancel), absolute, relative at the same weights."""


def assert_weights_move(run_dir: str | Path) -> None:
    """From a STEADY run's first checkpoint to its end, much farther than they may differ from another's."""
    first, end = weights(min((Path(run_dir) / "checkpoints").glob("step-*"))), weights(run_dir)
    assert max(float((end[name] - tensor).abs().max()) for name, tensor in first.items()) > 25 * WEIGHTS


def lived_through(group: Any) -> Any:
    """A sampled answer with what an iteration of ppo works out of each of its tokens, drawn at random."""
    rng = np.random.default_rng(len(group.responses[0]))
    for name in ("old", "reference", "values", "returns", "advantages"):
        group.tokens[name] = rng.normal(size=group.trained_tokens)
    group.tokens |= {name: np.ones(group.trained_tokens) for name in ("kl_weight", "learns")}
    return group


@pytest.mark.usefixtures("mixture")
@pytest.mark.parametrize("stage", long_but(STAGES, "sft", "dpo"))
def test_losses_and_weights_do_not_depend_on_the_split(run: Run, stage: str) -> None:
    options = [*STEADY, *STAGES[stage]]
    whole = run(*options, "run.dir=whole")
    assert_weights_move("whole")
    for name in SPLITS if stage in EVERY_SPLIT else BROAD:
        split = SPLITS[name]
        other = run(*options, "train.save_every=10", *split, f"run.dir={name.replace(' ', '-').replace(',', '')}")
        assert losses(other.run_dir) == pytest.approx(losses("whole"), rel=LOSSES, abs=LOSSES), name
        assert norms(other.run_dir) == pytest.approx(norms("whole"), rel=1e-4, abs=1e-7), name  # AdamW hides a scale
        assert_same_weights("whole", other.run_dir, WEIGHTS)
        for metric in {"nll", "perplexity", "token_accuracy", "brier", "margin", "kl", "reward"} & whole.start.keys():
            start, end = (value[metric]["value"] for value in (whole.start, whole.metrics))
            assert other.start[metric]["value"] == pytest.approx(start, rel=SCORES, abs=SCORES), name
            assert other.metrics[metric]["value"] == pytest.approx(end, rel=1e-4, abs=1e-5), name


@pytest.mark.usefixtures("mixture")
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_changes_neither_loss_nor_gradients(stage: str, layout: str) -> None:
    from posttrain.config import resolve
    from posttrain.data.batches import collate
    from posttrain.data.pipeline import prepare
    from posttrain.models.load import load_tokenizer
    from posttrain.models.networks import Networks, build_network

    cfg = resolve(small_arguments(*STAGES[stage]))
    tokenizer = load_tokenizer(cfg.model)
    groups = prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed).train.groups(range(6))
    if cfg.stage.answer_tokens:
        groups = [lived_through(group.in_two()) for group in groups]
    head, critic = cfg.stage.head({1}), cfg.stage.needs_critic
    policy, _ = build_network(cfg.model, cfg.adapter, torch.float32, cfg.train.seed, head=head, critic=critic)
    for parameter in policy.parameters():  # an adapter begins at zero, where its other half has no gradient
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    networks = Networks(policy, policy, tokenizer)
    reference = copy.deepcopy(policy)
    torch.nn.init.normal_(next(reference.parameters()), generator=torch.Generator().manual_seed(1))
    networks.frozen = lambda: nullcontext(reference)
    rows = [[0, 1, 2], [3, 4, 5]] if layout == "packed" else [[i] for i in range(6)]
    found = []
    for extra in (0, 1, 17):
        batch = collate(groups, rows, layout, extra_padding=extra)
        batch.reference = torch.full((len(batch.targets),), -1.0)
        loss, counts = cfg.stage.loss(networks, batch), cfg.stage.counts(batch)
        weights = cfg.stage.weights()
        total = sum(weights.get(name, 1.0) * term / counts[name] for name, term in loss.terms.items())
        assert isinstance(total, torch.Tensor)
        found.append((counts, total.detach(), torch.autograd.grad(total, networks.parameters, allow_unused=True)))
    counts, total, gradients = found[0]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    for other_counts, other_total, others in found[1:]:
        assert other_counts == counts
        torch.testing.assert_close(other_total, total, rtol=1e-5, atol=0)
        for gradient, other in zip(gradients, others, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None and other is not None:
                torch.testing.assert_close(other, gradient, rtol=0, atol=1e-5 * max(1.0, float(gradient.abs().max())))


def test_same_seed_same_bits_and_another_seed_another_run(run: Run) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"run.dir={name}", f"train.seed={seed}")
    assert log("a") == log("b")
    assert_same_weights("a", "b", 0.0)
    assert losses("a") != losses("c")


def test_a_streamed_run_of_one_rank_goes_on_with_two(run: Run, posttrain_process: Run) -> None:
    """Its losses are those of one rank that never stopped, so the ranks share each step's examples."""
    options = ["stage=pretrain", *STEADY, "data.train=[embedded:text:60,embedded:text:45]", "data.eval=", "data.streaming=true",
               "data.shuffle_buffer=23", "data.eval_fraction=0.2", "batch.size=7", "train.steps=14",
               "train.keep_checkpoints=9"]  # fmt: skip
    run(*options, "run.dir=one")
    done = posttrain_process(*options, "run.dir=two", "train.resume=one/checkpoints/step-000005", ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    assert "2 processes" in done["output"]
    assert "goes on in block" in done["output"]
    assert len(losses("two")) == 14 - 5
    assert losses("two") == pytest.approx(losses("one")[5:], rel=1e-5)
    assert_same_weights("one", "two", WEIGHTS)
    assert_weights_move("one")
    states = [json.loads(Path(f"{name}/checkpoints/step-000014/state.json").read_text()) for name in ("one", "two")]
    assert states[0]["stream"] == states[1]["stream"]
    assert states[0]["stream"]["feeds"][0]["epoch"] > 0


@pytest.mark.long
def test_training_improves_and_the_interval_excludes_the_start(run: Run) -> None:
    summary = run(
        "train.steps=200", "batch.size=64", "optim.lr=5e-4", "train.log_every=20", "data.train=embedded:prompt_completion:4000",
        "data.eval=embedded:prompt_completion:300:held_out", "eval.generate=150", "eval.verifier=exact", "eval.max_new_tokens=6",
    )  # fmt: skip
    for metric in ("nll", "accuracy"):
        assert summary.changes[metric]["better"] is True, metric
        assert summary.changes[metric]["low"] * summary.changes[metric]["high"] > 0


def test_what_a_run_leaves_behind(run: Run) -> None:
    summary = run(
        "run.dir=r",
        "eval.generate=3",
        "eval.max_new_tokens=4",
        "train.eval_every=1",
        "train.save_every=2",
        "train.keep_checkpoints=1",
    )
    files = {path.name for path in Path("r").iterdir()}
    wanted = (
        "config.yaml overrides.txt environment.json metrics.jsonl samples.jsonl summary.json checkpoints eval model"
    )
    assert set(wanted.split()) <= files
    lines = log("r")
    assert [(line["step"], line["split"]) for line in lines][:3] == [(0, "eval"), (1, "train"), (1, "eval")]
    train = lines[1]["metrics"]
    assert {"loss", "lr", "grad_norm", "clipped", "tokens", "trained_tokens", "nll"} <= train.keys()
    score = lines[0]["metrics"]["nll"]
    assert score.keys() == {"value", "low", "high", "se", "n", "clusters", "method"}
    assert score["low"] < score["value"] < score["high"]
    assert (score["clusters"], summary.steps) == (40, 4)
    kept = sorted(path.name for path in Path("r/checkpoints").iterdir())
    assert kept == ["step-000004"] or kept == sorted({Path(summary.best_checkpoint).name, "step-000004"})
    sample = json.loads(Path("r/samples.jsonl").read_text().splitlines()[0])
    assert sample.keys() == {"id", "prompt", "reference", "before", "after"}


def test_the_best_checkpoint_outlives_the_rotation(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate is such that the first evaluations are better than the start and the later ones worse."""
    often = ("train.steps=6", "train.save_every=4", "train.keep_checkpoints=1", "train.eval_every=1")
    summary = run("run.dir=r", "optim.lr=1e-4", *often)
    scores = {line["step"]: line["metrics"]["nll"]["value"] for line in log("r") if line["split"] == "eval"}
    best = min(scores, key=lambda step: scores[step])
    assert 0 < best < 6
    assert summary.best_checkpoint == f"r/checkpoints/step-{best:06d}"
    assert {p.name for p in Path("r/checkpoints").iterdir()} == {f"step-{best:06d}", "step-000006"}
    assert f"the best evaluation's are in {summary.best_checkpoint}/model" in capsys.readouterr().out


def test_a_start_that_nothing_beats_has_no_best_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run("run.dir=r", "optim.lr=1e-1", "schedule.warmup_steps=0", "train.eval_every=1")
    assert summary.metrics["nll"]["value"] > summary.start["nll"]["value"]
    assert summary.best_checkpoint is None
    assert json.loads(Path("r/summary.json").read_text())["best_checkpoint"] is None
    assert "no later evaluation beat the start's nll" in capsys.readouterr().out
    state = json.loads(Path("r/checkpoints/step-000004/state.json").read_text())
    assert (state["best_step"], state["evaluations_since_best"]) == (0, 4)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(run: Run, umask: int) -> None:
    before = os.umask(umask)
    try:
        run("run.dir=r", "train.steps=1")
    finally:
        os.umask(before)
    files = [path for path in Path("r").rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "metrics.jsonl", "summary.json"} <= {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}


def test_the_saved_model_scores_what_the_summary_says(run: Run) -> None:
    """Loaded by transformers alone, and by posttrain eval."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.data import embedded

    summary = run("run.dir=r")
    model, tokenizer = (cls.from_pretrained("r/model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    total = count = 0
    for row in embedded.rows("prompt_completion", 40, held_out=True):
        prompt, answer = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion")
        )
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        targets = ids[0, len(prompt) :]
        total -= logp[len(prompt) - 1 : -1].gather(-1, targets[:, None]).sum().item()
        count += len(targets)
    assert total / count == pytest.approx(summary.metrics["nll"]["value"], rel=1e-5)
    assert count == summary.metrics["nll"]["n"]


def test_mixed_sources_have_their_share(run: Run) -> None:
    """An epoch has as many documents as there are: of 200, 150 of 10 characters and 50 of 20, each closed by a token."""
    for name, text in (("short", "1+1=2 2+2="), ("long", "1+1=2 2+2=4 3+3=6 4+")):
        Path(f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 100)
    data = ["stage=pretrain", "data.train=[short.jsonl,long.jsonl]", "data.eval=embedded:text:20:held_out"]
    even = run(*data, "batch.size=50", "run.dir=even")
    mixed = run(*data, "batch.size=50", "data.mix=[3,1]", "run.dir=mixed")
    assert (even.steps, even.trained_tokens) == (4, 100 * 10 + 100 * 20)
    assert (mixed.steps, mixed.trained_tokens) == (4, 150 * 10 + 50 * 20)


def test_a_second_run_finds_the_tokens_of_the_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("data.cache=cache", "train.steps=1")
    run(*options, "run.dir=a")

    def never(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("posttrain.data.pipeline.Tokenizer", never)
    run(*options, "run.dir=b", "optim.lr=1e-5")
    with pytest.raises(AssertionError, match="tokenised again"):
        run(*options, "run.dir=c", "data.max_length=48")
