"""distribution=deepspeed: two ranks give what one process does, and go on from each other's checkpoints."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, small_arguments
from test_ranks import finish, launch
from test_train import LOSSES, STAGES, STEADY, WEIGHTS, assert_same_weights, losses, norms

import posttrain
from posttrain import zero
from posttrain.config import resolve
from posttrain.errors import ConfigError
from posttrain.zero import Zero
from posttrain.zero3 import SMALL, Zero3

Run = Callable[..., Any]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (pip install 'posttrain[deepspeed]')",
)
COMMON = [*STEADY, "batch.size=7", "batch.micro_tokens=128", "train.keep_checkpoints=9"]
DEEPSPEED = "distribution=deepspeed"
ZERO = {kind: [DEEPSPEED, f"distribution.zero_stage={kind}"] for kind in (2, 3)}
STAGES_OF = {
    "sft": [*STAGES["sft"], "optim.max_grad_norm=0.5"],  # below its gradients: DeepSpeed's own clipping is at work
    **{name: STAGES[name] for name in ("dpo lora", "gpro", "reward", "ppo", "grpo")},
    "qlora": ["adapter=qlora", "optim.lr=1e-3"],
}
WRITING = ["stage=sft", "train.steps=20", "train.epochs=null", "eval.resamples=100", "log.report=false"]
"""With 250 prompts a rank their longest answers differ."""
WIDE = [
    "model.init=config", "model.config.hidden_size=32", "model.config.head_dim=8", "model.config.vocab_size=200000",
    "eval.generate=0", "eval.verifier=none", "batch.size=40", "batch.micro_tokens=2048", "train.steps=4", "train.eval_every=2",
    "data.eval=embedded:prompt_completion:101:held_out",
]  # fmt: skip
"""83 tokens are as many as the output layer reads at a time."""


def cut_short(run_dir: str | Path, copy: str) -> None:
    """A copy of a run as if it had been killed after its first checkpoint."""
    shutil.copytree(run_dir, copy)
    for part in ("model", "checkpoints/step-000010"):
        shutil.rmtree(Path(copy) / part)
    (Path(copy) / "summary.json").unlink()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, warm_process: None) -> Iterator[Path]:
    """A folder with runs of one process (one/) and, by one launch of two ranks, of the others; what was said is in out.txt."""
    folder = tmp_path_factory.mktemp("zero")
    with chdir(folder):
        for stage, options in STAGES_OF.items():
            posttrain.run(small_arguments(*COMMON, *options, f"run.dir=one/{stage}"))
        tasks = {f"zero-{kind}/{n}": [*options, *ZERO[kind]] for kind in ZERO for n, options in STAGES_OF.items()}
        for kind in ZERO:
            cut_short("one/sft", f"adopted-{kind}")
            tasks[f"adopted-{kind}"] = [*STAGES_OF["sft"], *ZERO[kind]]
        tasks |= {"bf16/ddp": ["precision=bf16"], "bf16/zero": ["precision=bf16", *ZERO[3]]}
        tasks |= {"wide/ddp": WIDE, "wide/zero": [*WIDE, *ZERO[3]]}
        runs = [["train", *small_arguments(*COMMON, *options, f"run.dir={d}")] for d, options in tasks.items()]
        runs += [["train", *WRITING, "run.dir=writing/ddp"], ["train", *WRITING, *ZERO[3], "run.dir=writing/zero"]]
        Path("tasks.json").write_text(json.dumps(runs))
        status, said = finish(launch(str(ROOT / "tests" / "rank_runs.py"), "tasks.json"))
        assert status == 0, said
        yield folder
    shutil.rmtree(folder)


@pytest.mark.long
@needs_deepspeed
@pytest.mark.parametrize("kind", ZERO)
def test_two_ranks_give_what_one_process_does_and_each_goes_on_from_the_other(kind: int, ran: Path, run: Run) -> None:
    said = (ran / "out.txt").read_text()
    assert "Warning" not in said, said
    assert said.count(f"2 processes (DeepSpeed ZeRO {kind}, gloo)") >= len(STAGES_OF)
    assert min(norms(ran / "one/sft")) > 0.5
    for stage in STAGES_OF:
        one, two = ran / "one" / stage, ran / f"zero-{kind}" / stage
        assert losses(two) == pytest.approx(losses(one), rel=LOSSES, abs=LOSSES), two
        assert norms(two) == pytest.approx(norms(one), rel=1e-4), two
        assert_same_weights(one, two, WEIGHTS)
    assert_same_weights(ran / "one/sft", ran / f"adopted-{kind}", WEIGHTS)  # moments and their count too
    cut_short(ran / f"zero-{kind}" / "sft", "left")
    run(*COMMON, *STAGES_OF["sft"], "run.dir=left")  # one process, without DeepSpeed
    assert_same_weights(ran / "one/sft", "left", WEIGHTS)


@pytest.mark.long
@needs_deepspeed
def test_the_output_layer_computes_in_16_bits_as_ever(ran: Path) -> None:
    """Later steps part by roundings."""
    assert losses(ran / "bf16/zero")[:4] == pytest.approx(losses(ran / "bf16/ddp")[:4], rel=LOSSES)


@pytest.mark.long
@needs_deepspeed
def test_ranks_whose_answers_end_at_other_steps_write_them_together(ran: Path) -> None:
    """No rank may wait for another's forward pass."""
    written = [(ran / "writing" / d / "samples.jsonl").read_text().splitlines() for d in ("ddp", "zero")]
    answers = [[json.loads(line)["after"]["answer"] for line in lines] for lines in written]
    assert len(answers[0]) == 500
    assert sum(a != b for a, b in zip(*answers, strict=True)) <= 5  # rounding decides between near equals


@pytest.mark.long
@needs_deepspeed
def test_ranks_whose_tokens_are_more_chunks_than_anothers_do_not_wait(ran: Path) -> None:
    """ZeRO 3 takes for granted that every rank calls the same modules."""
    assert losses(ran / "wide/zero") == pytest.approx(losses(ran / "wide/ddp"), rel=LOSSES)


def test_an_adapted_output_layer_is_refused() -> None:
    policy = SimpleNamespace(head=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"output layer that is adapted or quantised.* set distribution=fsdp"):
        Zero3(policy)


@pytest.mark.long
@needs_deepspeed
def test_one_process_alone_may_have_zero_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for a launcher's variables there, which must not outlive the run."""
    ended: list[tuple[int, set[int]]] = []
    close = Zero.close

    def ending(self: Any) -> None:
        parts = {p.numel() for p in self.policy.parameters() if getattr(p, "ds_numel", 0) > SMALL}
        ended.append((self.engine.zero_optimization_stage(), parts))
        close(self)

    monkeypatch.setattr(Zero, "close", ending)
    run(*COMMON, "run.dir=one")
    run(*COMMON, *ZERO[3], "run.dir=zero")
    assert ended == [(3, {0})], "between uses nothing of the larger weights is there"
    assert_same_weights("one", "zero", WEIGHTS)
    assert "LOCAL_RANK" not in os.environ
    assert torch.nn.functional.linear.__module__ == "torch._C._nn"
    run(*COMMON, "run.dir=after")
    assert_same_weights("one", "after", 0.0)


@needs_deepspeed
@pytest.mark.usefixtures("mixture")
def test_a_mixture_is_refused(posttrain_process: Run) -> None:
    done = posttrain_process("model.path=mixture", "model.init=config", DEEPSPEED, "run.dir=r")
    assert done["status"] == 2
    assert "distribution=deepspeed with a mixture of experts" in done["output"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["optim=adamw8bit"], "optim=adamw8bit with distribution=deepspeed"),
        (
            ["stage=ppo", "stage.rewards=[exact]", "stage.critic_warmup=2"],
            "stage.critic_warmup=2 with distribution=deeps",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(small_arguments(DEEPSPEED, *options))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[deepspeed\]'"):
        zero.check_installed()
