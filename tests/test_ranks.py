"""Several ranks are one run: the numbers of one process, kills and signals that they all survive, an error that ends them all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import long_but, small_arguments
from test_resume import STAGES as RESUMED
from test_resume import assert_same_run
from test_train import (
    LOSSES,
    SCORES,
    STAGES,
    STEADY,
    WEIGHTS,
    assert_same_weights,
    assert_weights_move,
    log,
    losses,
    norms,
)

Run = Callable[..., Any]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
"""--standalone: a free port, so that two launches on a machine do not meet."""


def summary(run_dir: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run_dir) / "summary.json").read_text())
    return found


def launch(*command: str) -> subprocess.Popen[bytes]:
    """torchrun in a session of its own, its output in out.txt."""
    with Path("out.txt").open("w") as output:
        return subprocess.Popen([*TORCHRUN, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen[bytes], seconds: float = 200) -> tuple[int, str]:
    """Status and output; whatever is left after the time is killed, the ranks too."""
    try:
        status = process.wait(seconds)
    finally:
        if process.poll() is None:
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (process.pid, *map(int, ranks)):
                os.kill(pid, signal.SIGKILL)
    return status, Path("out.txt").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of one process, a folder each, made when first asked for."""
    made = tmp_path_factory.mktemp("alone")
    yield made
    shutil.rmtree(made)


SHARDED = ("sft", "lora", "pretrain", "dpo lora", "ipo of groups", "gpro", "reward", "ppo", "grpo", "mixture")
"""Stages that are run with weights in parts, too: between them all that gathers weights."""

QUICK = (("sft", "ddp"), ("dpo", "ddp"), ("ppo", "ddp"), ("sft", "fsdp"), ("ppo", "fsdp"))


def both_ways() -> list[Any]:
    """(stage, ddp) of all and (stage, fsdp) of SHARDED."""
    found = [*((stage, "ddp") for stage in STAGES), *((stage, "fsdp") for stage in SHARDED)]
    return [pytest.param(*each, marks=() if each in QUICK else pytest.mark.long) for each in found]


@pytest.mark.usefixtures("mixture")
@pytest.mark.parametrize(("stage", "how"), both_ways())
def test_two_ranks_give_what_one_does(alone: Path, run: Run, posttrain_process: Run, stage: str, how: str) -> None:
    """7 examples a step, so that the ranks' shares differ; few tokens a forward, so that both have some to evaluate."""
    options = [*STEADY, *STAGES[stage], "batch.size=7", "batch.micro_tokens=128"]
    one, two = alone / stage.replace(" ", "-"), Path("two")
    if not (one / "summary.json").exists():
        run(*options, f"run.dir={one}")
    done = posttrain_process(*options, "train.save_every=10", f"distribution={how}", "run.dir=two", ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    assert f"2 processes ({how.upper()}, gloo)" in done["output"]
    assert "UserWarning" not in done["output"], done["output"]
    assert losses(two) == pytest.approx(losses(one), rel=LOSSES, abs=LOSSES)
    assert norms(two) == pytest.approx(norms(one), rel=1e-4)  # AdamW would hide a gradient that is all too small alike
    assert_same_weights(one, two, WEIGHTS)
    assert_weights_move(one)
    a, b = summary(one), summary(two)
    assert a["start"].keys() == b["start"].keys()
    for metric in a["start"]:
        known, found = (
            [v for f in ("value", "low", "high", "se") if (v := s["start"][metric][f]) is not None] for s in (a, b)
        )
        assert found == pytest.approx(known, rel=SCORES, abs=SCORES), metric
    watched = "nll" if "nll" in a["metrics"] else "reward"
    assert b["metrics"][watched]["value"] == pytest.approx(a["metrics"][watched]["value"], rel=1e-4)


def test_the_ranks_share_the_answers(posttrain_process: Run) -> None:
    options = ("eval.generate=15", "eval.verifier=exact", "eval.max_new_tokens=4", "train.steps=1", "run.dir=r")
    done = posttrain_process(*options, ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    assert summary("r")["metrics"]["accuracy"]["n"] == 15
    assert len(Path("r/samples.jsonl").read_text().splitlines()) == 15


KILLED = {"in a step": ("posttrain.train:check_finite", 6, "before"),
          "between a checkpoint's files": ("torch:save", 4, "after")}  # fmt: skip


@pytest.mark.parametrize("stage", long_but(("sft", "lora"), "sft"))
def test_killed_together_and_started_again(posttrain_process: Run, stage: str) -> None:
    """As one process does, bit for bit; with dropout every rank has random numbers of its own."""
    options = RESUMED[stage]
    assert posttrain_process(*options, "run.dir=whole", ranks=2)["statuses"] == [0, 0]
    for number, moment in enumerate(KILLED.values()):
        killed = posttrain_process(*options, f"run.dir=r{number}", ranks=2, on_rank=0, die=moment)
        assert killed["statuses"][0] == -signal.SIGKILL, killed["output"]
        assert killed["statuses"][1] != 0, killed["output"]  # killed too, or it met the other's death first
        again = posttrain_process(*options, f"run.dir=r{number}", ranks=2)
        assert again["statuses"] == [0, 0], again["output"]
        assert "continues at step" in again["output"]
        assert_same_run(f"r{number}", "whole")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(posttrain_process: Run, before: int, after: int) -> None:
    """Without dropout the split is all that differs."""
    options = [*STEADY, *RESUMED["sft"], "train.keep_checkpoints=9"]
    assert posttrain_process(*options, "run.dir=whole")["status"] == 0
    moment = ("posttrain.train:check_finite", 6, "before")
    killed = posttrain_process(*options, "run.dir=r", ranks=before, die=moment)
    assert set(killed["statuses"]) == {-signal.SIGKILL}
    again = posttrain_process(*options, "run.dir=r", ranks=after)
    assert set(again["statuses"]) == {0}, again["output"]
    assert "continues at step 4" in again["output"]
    assert [line["step"] for line in log("r")] == [line["step"] for line in log("whole")]
    assert losses("r") == pytest.approx(losses("whole"), rel=LOSSES)  # also what was pooled before the kill
    assert_same_weights("r", "whole", WEIGHTS)
    assert_weights_move("whole")
    assert summary("r")["tokens"] == summary("whole")["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_finishes_the_step_and_saves(posttrain_process: Run, number: int) -> None:
    arguments = small_arguments("train.steps=100000", "train.eval_every=50000", "run.dir=r")
    process = launch("-m", "posttrain", *arguments)
    until = time.monotonic() + 100
    while "step 5/" not in Path("out.txt").read_text() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    began = time.monotonic()
    process.send_signal(number)
    _, said = finish(process, 60)
    assert time.monotonic() - began < 25, "the launcher had to kill the ranks"
    assert "finishing this step and saving" in said
    assert f"stopped by signal {int(number)}; the same command with run.dir=" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    (saved,) = Path("r/checkpoints").iterdir()
    step = int(saved.name[5:])
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == step >= 5
    assert len(state["pooled"]) == 2
    assert log("r")[-1]["step"] <= step
    assert not Path("r/summary.json").exists()


@pytest.mark.parametrize("ranks", [*long_but(([0], [1])), [0, 1]])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(posttrain_process: Run, ranks: list[int]) -> None:
    send = [("posttrain.train:check_finite", 5, signal.SIGTERM)]
    which = {} if len(ranks) == 2 else {"on_rank": ranks[0]}
    stopped = posttrain_process(*RESUMED["sft"], "run.dir=r", ranks=2, send=send, **which)
    assert stopped["statuses"] == [143, 143], stopped["output"]
    (newest,) = [path.name for path in sorted(Path("r/checkpoints").iterdir())][-1:]
    assert newest == "step-000006"  # all hear of it as the next step begins
    again = posttrain_process(*RESUMED["sft"], "run.dir=r", ranks=2)
    assert again["statuses"] == [0, 0], again["output"]
    assert posttrain_process(*RESUMED["sft"], "run.dir=whole", ranks=2)["status"] == 0
    assert log("r") == log("whole")


FAILURES = {
    "the loss": ({"poison": ["posttrain.models.policy:weighted_nll", 3]}, 1, "the loss is not finite at step 3; rank {}'s"),
    "the data": ({"fail": ["posttrain.data.token_dataset:TokenDataset.groups", 6, "no data"]}, 1, "no data"),
    "the model": ({"fail": ["posttrain.session:build_network", 1, "no model"]}, 1, "no model"),
    "an evaluation": ({"fail": ["posttrain.evaluate:gather", 2, "no scores"]}, 1, "no scores"),
}  # fmt: skip


@pytest.mark.parametrize("rank", long_but((0, 1), 1))
@pytest.mark.parametrize("what", FAILURES)
def test_an_error_on_one_rank_ends_all_and_is_the_one_told(posttrain_process: Run, what: str, rank: int) -> None:
    befalls, status, words = FAILURES[what]
    done = posttrain_process("run.dir=r", "batch.micro_tokens=64", ranks=2, on_rank=rank, **befalls)
    assert set(done["statuses"]) == {status}, done["output"]
    assert done["seconds"] < 30
    assert words.format(rank) in done["output"]
    assert "Connection closed" not in done["output"], "what another rank met because of it"
    told = [line for line in done["output"].splitlines() if "Error: " in line or "error: " in line]
    assert len(told) == 1, done["output"]
    assert not Path("r/summary.json").exists()


def test_a_rank_that_waits_is_ended(posttrain_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with NCCL, where no lost connection wakes it: here it sleeps."""
    done = posttrain_process("run.dir=r", ranks=2, on_rank=1, hang="posttrain.train:Trainer._begin",
                             others={"fail": ["posttrain.train:Trainer._begin", 1, "no start"]})  # fmt: skip
    assert set(done["statuses"]) == {1}, done["output"]
    assert done["seconds"] < 30
    assert "no start" in done["output"]


def test_a_mistake_that_all_ranks_meet_is_told_once(posttrain_process: Run) -> None:
    Path("d.jsonl").write_text('{"prompt": "1+1="}\n')
    for options in (["data.train=d.jsonl"], ["model.path=./nowhere"], ["optim.lr=-1"], ["data.max_length=999"]):
        done = posttrain_process(*options, "run.dir=r", ranks=2)
        assert done["statuses"] == [2, 2], done["output"]
        assert done["output"].count("posttrain: error: ") == 1, done["output"]
        assert "Traceback" not in done["output"]
        assert not Path("r").exists()


@pytest.mark.long
def test_one_rank_under_a_launcher_is_a_plain_run(posttrain_process: Run, run: Run) -> None:
    """torchrun --nproc_per_node=1, with several forwards a step; warnings, too, would be errors."""
    options = ["train.steps=3", "batch.micro_size=3"]
    process = subprocess.run(
        [*TORCHRUN[:-1], "--nproc_per_node=1", "-m", "posttrain", *small_arguments(*options, "run.dir=r")],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert process.returncode == 0, said
    assert "1 process" in said
    assert "arning" not in process.stderr
    run(*options, "run.dir=whole")
    assert log("r") == log("whole")
    assert_same_weights("r", "whole", 0.0)
