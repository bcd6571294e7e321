"""run.processes=N starts its ranks itself: the same run as a launcher's, every end told, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_arguments
from test_train import LOSSES, STEADY, WEIGHTS, assert_same_weights, assert_weights_move, log, losses

import posttrain
from posttrain import launch
from posttrain.config import resolve_section
from posttrain.errors import ConfigError

Run = Callable[..., Any]
RANK = """
import os, signal, sys, time
from pathlib import Path
from posttrain.launch import join_launch
join_launch()
rank, what = os.environ.get("RANK"), sys.argv[1:]
if "heard" in what:
    def heard(number, frame):
        print(f"rank {rank} heard {number}", flush=True)
        if "twice" not in what:
            sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, heard)
print(f"rank {rank} of {os.environ.get('WORLD_SIZE')} {os.environ.get('OMP_NUM_THREADS')}", flush=True)
Path(f"pid-{rank}").write_text(str(os.getpid()))
while not all(Path(f"pid-{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.02)
if what[0] == f"exits-{rank}":
    sys.exit(int(what[1]))
if what[0] == f"dies-{rank}":
    os.kill(os.getpid(), int(what[1]))
if what[0] != "ends":
    time.sleep(60)
"""
"""A rank without a model: what it does is in its arguments."""


def start(*what: str, processes: int = 2) -> subprocess.Popen[str]:
    """A process that launches such ranks, in a session of its own; its words go to out.txt."""
    Path("rank.py").write_text(RANK)
    code = f"import sys; from posttrain.launch import launch; sys.exit(launch({list(what)}, {processes}, "
    code += "[sys.executable, 'rank.py']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment["OMP_NUM_THREADS"]
    with Path("out.txt").open("w") as output:
        return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT, text=True,
                                env=environment, start_new_session=True)  # fmt: skip


def pids(ranks: int = 2) -> list[int]:
    """Of the ranks, once all are there."""
    until = time.monotonic() + 20
    files = [Path(f"pid-{rank}") for rank in range(ranks)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until, Path("out.txt").read_text()
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    """A zombie of another process's is not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_ranks_of_a_launch() -> None:
    process = start("ends", processes=3)
    assert process.wait(20) == 0
    cpus = len(os.sched_getaffinity(0))
    threads = max(1, cpus // 3)
    first, *ranks = Path("out.txt").read_text().splitlines()
    assert first.startswith(f"starting 3 processes on this machine, OMP_NUM_THREADS={threads} each: {cpus} CPU")
    assert sorted(ranks) == [f"rank {rank} of 3 {threads}" for rank in range(3)]


def test_the_program_is_posttrain(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(["--version"], 2) == 0
    said = capfd.readouterr().out.splitlines()
    assert said == ["starting 2 processes on this machine"] + [f"posttrain {posttrain.__version__}"] * 2


@pytest.mark.parametrize("status", [1, 2])
def test_the_status_is_that_of_the_rank_that_failed(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """The others, who wait for it, are ended after their time."""
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("rank.py").write_text(RANK)
    began = time.monotonic()
    assert launch.launch(["exits-1", str(status)], 2, [sys.executable, "rank.py"]) == status
    assert time.monotonic() - began < 20
    assert not any(alive(pid) for pid in pids())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_is_named(rank: int) -> None:
    process = start(f"dies-{rank}", "9")
    assert process.wait(20) == 1
    ranks = pids()
    assert f"rank {rank} (process {ranks[rank]}) was killed by SIGKILL" in Path("out.txt").read_text()
    assert not any(alive(pid) for pid in ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(number: int) -> None:
    """Ctrl-C in a terminal reaches the whole group of the process it started: the ranks are of none."""
    process = start("heard")
    pids()
    os.killpg(process.pid, number)
    assert process.wait(20) == 128 + number
    said = Path("out.txt").read_text()
    assert [said.count(f"rank {rank} heard {int(number)}") for rank in range(2)] == [1, 1]


def test_a_second_signal_is_passed_on_too() -> None:
    process = start("heard", "twice")
    ranks = pids()
    for count in (1, 2):
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while Path("out.txt").read_text().count("heard 15") < 2 * count and time.monotonic() < until:
            time.sleep(0.02)
        assert Path("out.txt").read_text().count("heard 15") == 2 * count
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(20) == 1


def test_no_rank_outlives_its_launcher() -> None:
    process = start("waits")
    ranks = pids()
    process.kill()
    process.wait(20)
    until = time.monotonic() + 5
    while any(alive(pid) for pid in ranks) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in ranks)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_ours", True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=r"run.processes=4, but this machine shows 2 GPUs .* set run.processes=2"):
        launch.check_devices()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    launch.check_devices()


def test_the_number_is_found_without_torch() -> None:
    """It may stand in a recipe; a mistyped key is told before anything is started."""
    Path("two.yaml").write_text("run: {processes: 2}\n")
    code = "import sys; from posttrain.config import resolve_section as r; "
    code += "print(r(['recipe=two.yaml'], 'run').processes, 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "2 False\n"
    assert resolve_section(["stage=dpo", "stage.beta=-1"], "run").processes is None
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        resolve_section(["run.processes=2", "optim.lrr=1"], "run")


def test_from_python_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"from a shell: posttrain run.processes=2"):
        posttrain.run([*small_arguments(), "run.processes=2"])


def test_it_is_stopped_goes_on_and_gives_what_one_process_does(posttrain_process: Run, run: Run) -> None:
    """The signal comes while rank 0 is in its fifth step: to the launcher and to the rank, as SLURM sends it."""
    fifth = ["posttrain.train:check_finite", 5, signal.SIGTERM]
    options = [*STEADY, "batch.size=7", "batch.micro_tokens=128", "train.steps=9", "train.save_every=3",
               "train.keep_checkpoints=9"]  # fmt: skip
    two = [*options, "run.processes=2", "run.dir=two"]
    stopped = posttrain_process(*two, launches=True, on_rank=0, send=[fifth], send_up=fifth)
    assert stopped["status"] == 143, stopped["output"]
    assert stopped["output"].count("SIGTERM: finishing this step and saving") == 1
    assert any(Path("two/checkpoints").iterdir())
    assert not Path("two/summary.json").exists()
    done = posttrain_process(*two, launches=True)
    assert done["status"] == 0, done["output"]
    assert "2 processes (DDP, gloo)" in done["output"]
    assert "continues at step" in done["output"]
    run(*options, "run.dir=one")
    assert losses("two") == pytest.approx(losses("one"), rel=LOSSES, abs=LOSSES)
    assert [line["step"] for line in log("two")] == [line["step"] for line in log("one")]
    assert_same_weights("one", "two", WEIGHTS)
    assert_weights_move("one")


@pytest.mark.parametrize(("verb", "setting"), [("train", "stage.nope=1"), ("eval", "data.max_length=999")])
def test_a_mistake_is_told_once(posttrain_process: Run, verb: str, setting: str) -> None:
    """One that the configuration shows, and one that the model does; an evaluation runs in several processes too."""
    done = posttrain_process(setting, "run.processes=2", "run.dir=r", verb=verb, launches=True)
    assert done["status"] == 2, done["output"]
    assert done["output"].count("posttrain: error: ") == 1, done["output"]


def test_a_rank_that_is_killed_while_training(posttrain_process: Run) -> None:
    moment = ["posttrain.train:check_finite", 3, "before"]
    done = posttrain_process("run.processes=2", "run.dir=r", launches=True, on_rank=1, die=moment)
    assert done["status"] == 1
    assert "rank 1 (process " in done["output"]
    assert done["seconds"] < 30
