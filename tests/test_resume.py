"""Interrupted is uninterrupted: killed at any moment and started again, a run leaves the same numbers and weights, bit for bit.

Real processes die of real SIGKILLs (tests/process_server.py). A new stage joins by standing in STAGES.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_arguments
from safetensors.torch import load_file

from posttrain.errors import CheckpointError, ConfigError

Run = Callable[..., Any]
VARYING = {
    "tokens_per_second",
    "rollout_seconds",
    "reward_seconds",
    "score_seconds",
    "rollout_tokens_per_second",
    "score_tokens_per_second",
    "update_seconds",
    "update_tokens_per_second",
    "peak_memory_bytes",
    "seconds",
    "run_dir",
    "model_dir",
    "best_checkpoint",
}
STEPS = ("train.steps=9", "train.eval_every=3", "train.save_every=2", "train.log_every=4")
SAMPLES = ("eval.generate=3", "eval.max_new_tokens=3", "eval.verifier=exact")

STAGES = {
    "sft": [*STEPS, *SAMPLES],
    "pretrain": [*STEPS, "stage=pretrain", "data.train=embedded:text:200", "data.eval=embedded:text:40:held_out"],
    "dpo": [*STEPS, *SAMPLES, "stage=dpo", "data.train=embedded:pairs:200", "data.eval=embedded:pairs:40:held_out"],
    "gpro": [
        *STEPS,
        "stage=gpro",
        "stage.form=dual",
        "data.train=embedded:groups:100",
        "data.eval=embedded:groups:40:held_out",
    ],
    "reward": [*STEPS, "stage=reward", "data.train=embedded:pairs:200", "data.eval=embedded:pairs:40:held_out"],
    "ppo": [
        "train.steps=10",
        "train.eval_every=4",
        "train.save_every=2",
        "train.log_every=3",
        "eval.generate=3",
        "eval.max_new_tokens=3",
        "eval.verifier=exact",
        "stage=ppo",
        "stage.rewards=[exact]",
        "stage.max_new_tokens=4",
        "stage.samples=3",
        "stage.epochs=1",
        "stage.minibatches=2",
        "stage.kl_target=1.0",
        "stage.whiten=true",
        "stage.normalize_rewards=running",
        "data.train=embedded:prompts:100",
        "data.eval=embedded:prompts:40:held_out",
    ],
    "dpo lora": [
        *STEPS,
        "stage=dpo",
        "adapter=lora",
        "adapter.dropout=0.1",
        "data.train=embedded:pairs:200",
        "data.eval=embedded:pairs:40:held_out",
    ],
    "lora": [*STEPS, "stage=lora", "adapter.dropout=0.1", "optim.lr=1e-3"],
    "qlora": [*STEPS, "stage=qlora", "adapter.dropout=0.1", "optim.lr=1e-3"],
    "bottleneck": [*STEPS, "adapter=bottleneck", "adapter.width=8", "adapter.dropout=0.1", "optim.lr=1e-3"],
    "sft smoothed": [*STEPS, "stage.label_smoothing=0.1", "optim.lr=1e-5"],  # gets better: the best are saved too
    "streaming": [
        *STEPS,
        "stage=pretrain",
        "data.train=[embedded:text:40,embedded:text:25]",
        "data.eval=",
        "data.eval_fraction=0.2",
        "data.streaming=true",
        "data.shuffle_buffer=17",
    ],
}
MOMENTS = {
    "before the directory is a run": ("posttrain.rundir:write_json", 1, "before"),
    "in the middle of making it": ("posttrain.rundir:write_text", 1, "before"),
    "before any checkpoint": ("posttrain.train:Trainer._update", 2, "before"),
    "in a step": ("posttrain.train:check_finite", 6, "before"),
    "in the middle of a line of metrics": ("posttrain.report.sinks:MetricsFile._append", 4, "halfway"),
    "while evaluating": ("posttrain.evaluate:Evaluator._summarise", 3, "before"),
    "after the records, before their line": ("posttrain.report.logbook:write_records", 3, "after"),
    "after the line, before the checkpoint": ("posttrain.train:Trainer._look", 2, "after"),
    "before a checkpoint's weights": ("posttrain.saving:save_model", 2, "before"),
    "after a checkpoint's weights": ("posttrain.saving:save_model", 2, "after"),
    "between its files": ("torch:save", 4, "after"),
    "while it is flushed": ("os:fsync", 20, "before"),
    "before it gets its name": ("posttrain.disk:remove", 3, "after"),
    "between its name and the rotation": ("posttrain.checkpoint:rotate", 3, "before"),
    "while rotating": ("shutil:rmtree", 8, "before"),
    "after rotating": ("posttrain.checkpoint:rotate", 4, "after"),
    "after the last checkpoint": ("posttrain.checkpoint:rotate", 5, "after"),
    "while the final model is written": ("posttrain.runfiles:save_model", 1, "before"),
    "before the summary": ("posttrain.runfiles:write_json", 1, "before"),
}
FEWER = ("in a step", "after the records, before their line", "between its files", "between its name and the rotation",
         "after the last checkpoint")  # fmt: skip
"""The loop and the disk are the same for every stage: all moments for the first; of these the first, and one more by turns, for
the others."""

SAMPLING = {
    "while it samples": ("posttrain.stages.experience:token_columns", 3, "before"),
    "between its epochs": ("posttrain.train:check_finite", 4, "before"),
}
"""Of a stage that makes its own steps. Evaluations sample too."""

CASES = [("sft", moment) for moment in MOMENTS]
CASES += [
    (stage, moment)
    for number, stage in enumerate(stage for stage in STAGES if stage != "sft")
    for moment in (FEWER[0], FEWER[1 + number % (len(FEWER) - 1)])
]
CASES += [("ppo", moment) for moment in SAMPLING]
QUICK = [("sft", moment) for moment in (*FEWER, "before any checkpoint", "while it is flushed")]
QUICK += [(stage, FEWER[0]) for stage in ("dpo", "ppo", "lora", "streaming")]
MOMENTS |= SAMPLING


def log(run_dir: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from time to time."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {**line, "time_s": None, "metrics": {k: v for k, v in line["metrics"].items() if k not in VARYING}}
        for line in lines
    ]


def summary(run_dir: str | Path) -> dict[str, Any]:
    found = json.loads((Path(run_dir) / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in VARYING}


def assert_same_run(ours: str | Path, theirs: str | Path) -> None:
    """The same metrics, weights, records, answers and summary, to the last bit; and nothing left over."""
    ours, theirs = Path(ours), Path(theirs)
    assert log(ours) == log(theirs)
    a, b = (load_file(next((path / "model").glob("*.safetensors"))) for path in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    names = sorted(path.name for path in (theirs / "eval").iterdir())
    assert sorted(path.name for path in (ours / "eval").iterdir()) == names
    for name in names:
        assert (ours / "eval" / name).read_bytes() == (theirs / "eval" / name).read_bytes(), name
    assert summary(ours) == summary(theirs)
    answers = [path / "samples.jsonl" for path in (ours, theirs)]
    assert answers[0].exists() == answers[1].exists()
    assert not answers[0].exists() or answers[0].read_bytes() == answers[1].read_bytes()
    left = {str(path.relative_to(ours)) for path in ours.rglob("*") if "tensorboard" not in str(path)}
    assert left == {str(path.relative_to(theirs)) for path in theirs.rglob("*") if "tensorboard" not in str(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Uninterrupted runs, a folder each, made when first asked for."""
    made = tmp_path_factory.mktemp("whole")
    yield made
    shutil.rmtree(made)


def uninterrupted(whole: Path, posttrain_process: Run, stage: str) -> Path:
    if not (whole / stage / "summary.json").is_file():
        done = posttrain_process(*STAGES[stage], f"run.dir={whole / stage}")
        assert done["status"] == 0, done["output"]
        (whole / f"{stage}.seconds").write_text(str(done["seconds"]))
    return whole / stage


@pytest.mark.parametrize(
    ("stage", "moment"),
    [pytest.param(s, m, id=f"{s}: {m}", marks=() if (s, m) in QUICK else pytest.mark.long) for s, m in CASES],
)
def test_killed_and_started_again(posttrain_process: Run, whole: Path, stage: str, moment: str) -> None:
    expected = uninterrupted(whole, posttrain_process, stage)
    killed = posttrain_process(*STAGES[stage], "run.dir=r", die=MOMENTS[moment])
    assert killed["status"] == -signal.SIGKILL, f"it never came to that: {killed['output']}"
    saved = [json.loads((p / "state.json").read_text())["step"] for p in Path("r").glob("checkpoints/step-*")]
    again = posttrain_process(*STAGES[stage], "run.dir=r")
    assert again["status"] == 0, again["output"]
    assert (f"continues at step {max(saved)}" in again["output"]) if saved else ("continues" not in again["output"])
    assert_same_run("r", expected)


def test_the_best_is_saved_when_it_is_found(posttrain_process: Run, whole: Path) -> None:
    """At step 3, where no checkpoint is due, and killed before that one is written."""
    expected = uninterrupted(whole, posttrain_process, "sft smoothed")
    best = [line["step"] for line in log(expected) if line["split"] == "eval"][1:]
    assert best == [3, 6, 9]
    options = [*STAGES["sft smoothed"], "train.keep_checkpoints=99"]
    killed = posttrain_process(*options, "run.dir=r", die=("posttrain.saving:save_model", 2, "before"))
    assert killed["status"] == -signal.SIGKILL
    assert [p.name for p in Path("r/checkpoints").glob("step-*")] == ["step-000002"]
    assert posttrain_process(*options, "run.dir=r")["status"] == 0
    saved = sorted(int(p.name[5:]) for p in Path("r/checkpoints").iterdir())
    assert saved == [2, 3, 4, 6, 8, 9]
    assert log("r") == log(expected)
    state = json.loads(Path("r/checkpoints/step-000003/state.json").read_text())
    assert state["best_step"] == 3
    assert json.loads(Path("r/summary.json").read_text())["best_checkpoint"] == "r/checkpoints/step-000009"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_at_any_time(posttrain_process: Run, whole: Path, seed: int) -> None:
    expected = uninterrupted(whole, posttrain_process, "sft")
    seconds = float((whole / "sft.seconds").read_text())
    draw = random.Random(seed)
    for _ in range(2):
        posttrain_process(*STAGES["sft"], "run.dir=r", kill_after_s=draw.uniform(0.3, 1.0) * seconds)
    again = posttrain_process(*STAGES["sft"], "run.dir=r")
    assert again["status"] == 0, again["output"]
    assert_same_run("r", expected)


def test_patience_and_best_so_far_go_on(posttrain_process: Run) -> None:
    """Killed one evaluation before patience ends, and between its last checkpoint and the summary."""
    options = [
        "train.steps=40",
        "train.eval_every=1",
        "train.save_every=1",
        "train.patience=3",
        "optim.lr=0.3",
        *SAMPLES,
    ]
    assert posttrain_process(*options, "run.dir=whole")["status"] == 0
    found = summary("whole")
    assert found["stopped_early"]
    assert found["changes"]
    last = found["steps"]
    assert len([line for line in log("whole") if (line["step"], line["split"]) == (last, "eval")]) == 1
    for name, call in (("before", last - 1), ("after", last)):
        killed = posttrain_process(*options, f"run.dir={name}", die=("posttrain.checkpoint:rotate", call, "after"))
        assert killed["status"] == -signal.SIGKILL
        assert posttrain_process(*options, f"run.dir={name}")["status"] == 0
        assert_same_run(name, "whole")


def test_rope_scaling_is_not_applied_twice(posttrain_process: Run) -> None:
    options = [*STEPS, "model.rope_scaling={type: ntk, factor: 2.0}"]
    assert posttrain_process(*options, "run.dir=whole")["status"] == 0
    posttrain_process(*options, "run.dir=r", die=MOMENTS["in a step"])
    assert posttrain_process(*options, "run.dir=r")["status"] == 0
    assert_same_run("r", "whole")


def test_tensorboard_goes_on_as_the_same_run(posttrain_process: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [*STEPS, "log=tensorboard"]
    assert posttrain_process(*options, "run.dir=whole")["status"] == 0
    for moment in ("before any checkpoint", "after the line, before the checkpoint"):
        assert posttrain_process(*options, "run.dir=r", die=MOMENTS[moment])["status"] == -signal.SIGKILL
    assert posttrain_process(*options, "run.dir=r")["status"] == 0
    assert_same_run("r", "whole")
    scalars = []
    for name in ("r", "whole"):
        events = EventAccumulator(f"{name}/tensorboard").Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.split("/")[1] not in VARYING]
        scalars.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})
    assert scalars[0] == scalars[1]
    assert [step for step, _ in scalars[0]["train/loss"]] == [4, 8, 9]


@pytest.mark.long
def test_wandb_goes_on_as_the_same_run(posttrain_process: Run) -> None:
    options = [*STEPS, "log=wandb", "log.mode=offline"]
    killed = posttrain_process(*options, "run.dir=r", die=MOMENTS["after the line, before the checkpoint"])
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    identity = Path("r/wandb_id.txt").read_text()
    again = posttrain_process(*options, "run.dir=r")
    assert again["status"] == 0, again["output"]
    assert Path("r/wandb_id.txt").read_text() == identity
    records = [path.name for path in Path("r/wandb").glob("offline-run-*/*.wandb")]
    assert set(records) == {f"run-{identity}.wandb"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_its_status(
    posttrain_process: Run, whole: Path, number: int, status: int
) -> None:
    expected = uninterrupted(whole, posttrain_process, "sft")
    stopped = posttrain_process(*STAGES["sft"], "run.dir=r", send=[("posttrain.train:check_finite", 5, number)])
    assert stopped["status"] == status, stopped["output"]
    assert "finishing this step and saving" in stopped["output"]
    assert "the same command with run.dir=" in stopped["output"]
    assert "Traceback" not in stopped["output"]
    assert Path("r/checkpoints/step-000005/state.json").is_file()
    assert not Path("r/summary.json").exists()
    again = posttrain_process(*STAGES["sft"], "run.dir=r")
    assert "continues at step 5" in again["output"]
    shutil.rmtree("r/checkpoints/step-000005", ignore_errors=True)  # the uninterrupted run has none there
    assert log("r") == log(expected)
    assert summary("r") == summary(expected)


@contextmanager
def command_line(*overrides: str) -> Iterator[subprocess.Popen[str]]:
    """posttrain as a shell starts it, for longer than any test."""
    command = [sys.executable, "-m", "posttrain", *small_arguments("train.steps=100000", "run.dir=r", *overrides)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Until it says so."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    raise AssertionError("".join(said))


@pytest.mark.long
def test_a_process_of_the_command_line_hears_a_signal() -> None:
    with command_line() as process:
        wait_for(process, "step 10/")
        process.send_signal(signal.SIGTERM)
        wait_for(process, "finishing this step and saving")
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 143, output
    (saved,) = Path("r/checkpoints").iterdir()
    assert int(saved.name[5:]) >= 10


@pytest.mark.long
def test_a_second_signal_to_it_stops_at_once() -> None:
    """In the middle of a step of minutes, which is neither finished nor saved."""
    with command_line("batch.size=20000", "batch.micro_size=1") as process:
        wait_for(process, "training\n")
        process.send_signal(signal.SIGINT)
        wait_for(process, "finishing this step and saving; send it again to stop at once")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT, output
    assert not list(Path("r").glob("checkpoints/*"))
    assert [line["step"] for line in log("r")] == [0]


def test_a_second_signal_stops_at_once(posttrain_process: Run, whole: Path) -> None:
    """While the checkpoint that the first one asked for is written: that one is absent, the one before is whole."""
    expected = uninterrupted(whole, posttrain_process, "sft")
    twice = [
        ("posttrain.train:check_finite", 5, signal.SIGTERM),
        ("posttrain.saving:save_model", 3, signal.SIGTERM),
    ]
    killed = posttrain_process(*STAGES["sft"], "run.dir=r", send=twice)
    assert killed["status"] == -signal.SIGTERM, killed["output"]
    assert sorted(p.name for p in Path("r/checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    assert posttrain_process(*STAGES["sft"], "run.dir=r")["status"] == 0
    assert_same_run("r", expected)


class TestWhichCheckpoint:
    def test_a_finished_run_says_so(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        first = run("run.dir=r")
        assert run("run.dir=r").metrics == first.metrics
        assert "already finished (4 steps)" in capsys.readouterr().out

    def test_another_config_is_refused_by_its_key(self, run: Run) -> None:
        run("run.dir=r")
        with pytest.raises(CheckpointError, match=r"optim.lr \(0.0001 there, 0.002 now\)"):
            run("run.dir=r", "optim.lr=2e-3")
        with pytest.raises(CheckpointError, match=r"train.resume=never"):
            run("run.dir=r", "train.resume=never")

    def test_incomplete_ones_are_passed_over(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        run("run.dir=r", "train.save_every=2", "train.keep_checkpoints=9")
        Path("r/summary.json").unlink()
        Path("r/checkpoints/step-000004/optimizer.pt").unlink()
        capsys.readouterr()
        assert run("run.dir=r", "train.save_every=2", "train.keep_checkpoints=9").steps == 4
        assert "continues at step 2" in capsys.readouterr().out

    def test_one_that_is_named_goes_on_elsewhere(self, run: Run) -> None:
        """In a new directory: its first scores are those of the checkpoint's step."""
        run("run.dir=a", "train.save_every=2", "train.keep_checkpoints=9")
        run("run.dir=b", "train.resume=a/checkpoints/step-000002")
        assert [(line["step"], line["split"]) for line in log("b")][:2] == [(2, "eval"), (3, "train")]
        there, here = ([line for line in log(name) if line["split"] == "train"] for name in "ab")
        assert here == there[2:]

    def test_going_back_takes_later_checkpoints_away(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("run.dir=r", "train.save_every=2", "train.keep_checkpoints=9")
        before = run(*options)
        lines = log("r")
        after = run(*options, "train.resume=r/checkpoints/step-000002")
        assert "removed step-000004: later than the checkpoint" in capsys.readouterr().out
        assert after.metrics == before.metrics
        assert log("r") == lines

    def test_one_of_another_model_is_refused(self, run: Run) -> None:
        small = ("model.init=config", "model.config.num_hidden_layers=2", "train.steps=1")
        run("run.dir=small", *small)
        run("run.dir=lora", "stage=lora", "train.steps=1")
        for resumed, options, words in (
            ("small", (), "num_hidden_layers 2 there, 4 in embedded"),
            ("lora", (), "holds an adapter, but adapter=none"),
            ("small", ("stage=lora",), "holds a whole model, but adapter=lora"),
            ("lora", ("stage=lora", "adapter.rank=3"), "adapter.rank 16 there, 3 now"),
            ("lora", ("stage=lora", "adapter.targets=qkvo"), "adapter.targets qv there, qkvo now"),
        ):
            with pytest.raises(CheckpointError, match=words):
                run("run.dir=other", f"train.resume={resumed}", *options)
        assert not Path("other").exists()

    def test_one_past_the_end_is_refused(self, run: Run) -> None:
        run("run.dir=r")
        with pytest.raises(CheckpointError, match="is at step 4, past this run's end at step 2"):
            run("run.dir=other", "train.resume=r", "train.steps=2")


def test_patience_stops_a_run_that_gets_no_better(run: Run) -> None:
    found = run("train.steps=40", "train.eval_every=1", "train.patience=2", "optim.lr=0.3", "run.dir=r")
    assert found.stopped_early
    assert found.steps < 10
    assert found.metrics
    with pytest.raises(ConfigError, match=r"train.patience=2 needs scores"):
        run("train.patience=2", "data.eval=", "data.eval_fraction=0")


def test_what_a_rank_has_pooled_goes_on_with_any_number_of_ranks() -> None:
    from posttrain.meter import _share_of

    pooled = [{"nll": [1.0, 2.0], "grad_norm": [5.0, 3.0]}, {"nll": [4.0, 8.0], "grad_norm": [5.0, 3.0]}]
    assert [_share_of(pooled, rank, 2) for rank in range(2)] == pooled
    shares = [_share_of(pooled, rank, 3) for rank in range(3)]
    assert np.sum([share["nll"] for share in shares], axis=0).tolist() == [5.0, 10.0]
    assert all(share["grad_norm"] == [5.0, 3.0] for share in shares)
    assert _share_of([], 0, 1) == {}


def test_other_data_than_the_run_began_with_is_refused(posttrain_process: Run) -> None:
    """Its rows would be other steps, and its scores could not be compared."""
    from posttrain.data import embedded

    rows = [json.dumps(row) + "\n" for row in embedded.rows("prompt_completion", 80)]
    Path("d.jsonl").write_text("".join(rows[:60]))
    options = [*STEPS, "data.train=d.jsonl", "data.eval=", "run.dir=r"]
    assert posttrain_process(*options, die=("posttrain.checkpoint:rotate", 2, "after"))["status"] == -signal.SIGKILL
    Path("d.jsonl").write_text("".join(rows))
    refused = posttrain_process(*options)
    assert refused["status"] == 2
    assert "begun with other data" in refused["output"]
    Path("d.jsonl").write_text("".join(rows[:60]))
    assert posttrain_process(*options)["status"] == 0


def test_a_run_from_anothers_checkpoint_goes_on_from_its_own(posttrain_process: Run) -> None:
    """The command of a requeued job names where the run once began."""
    assert posttrain_process(*STEPS, "run.dir=a")["status"] == 0
    first = sorted(Path("a/checkpoints").iterdir())[0]
    options = [*STEPS, f"train.resume={first}", "run.dir=b"]
    done = posttrain_process(*options, die=("posttrain.runfiles:write_json", 1, "before"))
    assert done["status"] == -signal.SIGKILL
    saved = {path.name for path in Path("b/checkpoints").iterdir()}
    again = posttrain_process(*options)
    assert again["status"] == 0
    assert "removed" not in again["output"]
    assert {path.name for path in Path("b/checkpoints").iterdir()} == saved


def test_what_a_user_keeps_in_a_run_stays(posttrain_process: Run) -> None:
    """A start that came to nothing gives way, but not the files beside it."""
    assert (
        posttrain_process("run.dir=r", die=("posttrain.train:Trainer._update", 1, "before"))["status"]
        == -signal.SIGKILL
    )
    for name in ("eval/mine.jsonl", "checkpoints/epoch1.pt", "notes.txt"):
        Path("r", name).parent.mkdir(exist_ok=True)
        Path("r", name).write_text("mine")
    assert posttrain_process("run.dir=r", "optim.lr=2e-4")["status"] == 0
    assert all(
        Path("r", name).read_text() == "mine" for name in ("eval/mine.jsonl", "checkpoints/epoch1.pt", "notes.txt")
    )
