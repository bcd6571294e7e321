"""posttrain --multirun: every job judged before the first, a run each, one table; stopped and failed ones go on."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm_like
from conftest import ROOT, small_arguments

from posttrain import cli
from posttrain.comparison import measured_differently
from posttrain.config import resolve
from posttrain.errors import ConfigError
from posttrain.models.embedded import DIRECTORY
from posttrain.report.console import Console
from posttrain.sweep import slurm
from posttrain.sweep.ending import tell
from posttrain.sweep.plan import plan
from posttrain.sweep.record import Sweep

Run = Callable[..., Any]
FEW = ("train.steps=2", "train.log_every=1", "data.eval=embedded:prompt_completion:20:held_out")


def record(path: str = "runs/sweeps/s") -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads((Path(path) / "sweep.json").read_text())["jobs"]
    return jobs


def small(*overrides: str) -> list[str]:
    return small_arguments(*FEW, "run.name=s", *overrides)


# --- before anything starts ---


def test_the_jobs_of_a_sweep() -> None:
    sweep = plan([*small("optim.lr=1e-4,1e-3", "data.train=embedded:text:20,embedded:prompt_completion:20")])
    assert sweep.path == Path("runs/sweeps/s")
    names = ["embedded-text-20", "embedded-prompt_completion-20"]
    assert sorted(job.name for job in sweep.jobs) == sorted(
        f"train={n}_lr={lr}" for n in names for lr in ("1e-4", "1e-3")
    )
    for job in sweep.jobs:
        assert job.arguments[-1] == f"run.dir=runs/sweeps/s/{job.name}"
        assert "run.name=s" not in job.arguments
        assert job.config.optim.lr == float(dict(o.split("=") for o in job.overrides)["optim.lr"])
    assert not Path("runs").exists()


def test_names_are_safe_short_and_told_apart() -> None:
    long = "x" * 200 + "/end.jsonl"
    values = ["a b/ü.jsonl", "a-b/ö.jsonl", long]
    names = [job.name for job in plan(small(f"data.train={','.join(values)}")).jobs]
    assert names == ["train=a-b-.jsonl", "train=a-b-.jsonl-2", f"train={'x' * 30}-end.jsonl"]
    names = [job.name for job in plan(small("schedule.name=linear,cosine", "optim.name=adamw,adamw8bit")).jobs]
    assert "schedule.name=linear_optim.name=adamw8bit" in names


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["optim.lr=1e-3,-1,0"],
            "2 of 3 jobs cannot be; none was started\n  optim.lr=-1: optim.lr must be > 0, got -1",
        ),
        (["optim.lr=1e-3,0.001"], "optim.lr=1e-3 and optim.lr=0.001 are the same run"),
        (["optim.lrr=1,2"], "did you mean optim.lr?"),
        (["run.name=a,b"], "run.name is of the whole sweep"),
        (["sweep.gpus=1,2"], "sweep.gpus is of the whole sweep"),
        (["sweep.gpu=1", "optim.lr=1e-3,1e-4"], "did you mean sweep.gpus?"),
        (["optim.lr=1e-3"], "no key has several values"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    assert cli.main(["--multirun", *small(*given)]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_goes_with_no_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["plan", "--multirun", *small("optim.lr=1e-3,1e-4")]) == 2
    assert "posttrain plan takes one config" in capsys.readouterr().err
    assert cli.main(small("sweep.gpus=2")) == 2
    assert "sweep.gpus=2 is of sweeps alone: posttrain --multirun sweep.gpus=2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["--multirun", *small("optim.lr=1e-3,1e-4")]) == 2
    assert "one of a launcher's 2 processes; leave the launcher out" in capsys.readouterr().err


def test_a_directory_that_is_no_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/sweeps/s").mkdir(parents=True)
    Path("runs/sweeps/s/thesis.txt").touch()
    assert cli.main(["--multirun", *small("optim.lr=1e-3,1e-4")]) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err


def test_a_run_has_nothing_of_the_sweep() -> None:
    assert "sweep" not in resolve(small("recipe=")).as_dict()


# --- here ---


def test_a_job_that_fails_and_the_same_command_again(posttrain_process: Run) -> None:
    """The others run; again, what is finished is left as it is. With another config it is refused beforehand."""
    command = small("model.path=embedded,./later")
    done = posttrain_process(*command, verb="--multirun", launches=True)
    assert done["status"] == 1, done["output"]
    assert [(job["status"], job["exit_status"]) for job in record()] == [("done", 0), ("failed", 2)]
    table = done["output"].split("best first by nll (lower is better)")[1]
    assert "path=.-later" in table
    assert "failed (exit status 2)" in table
    first = Path("runs/sweeps/s/path=embedded/summary.json").stat()
    shutil.copytree(DIRECTORY, "later")
    again = posttrain_process(*command, verb="--multirun", launches=True)
    assert again["status"] == 0, again["output"]
    assert "1 of them already finished" in again["output"]
    assert [job["status"] for job in record()] == ["done", "done"]
    assert Path("runs/sweeps/s/path=embedded/summary.json").stat() == first
    assert "baseline" in again["output"].split("best first by nll")[1]
    assert "no detectable change" in again["output"]  # the same model twice
    assert {"compare.html", "compare.json"} < {path.name for path in Path("runs/sweeps/s").iterdir()}
    other = posttrain_process(*small("model.path=embedded,./later", "batch.size=4"), verb="--multirun", launches=True)
    assert other["status"] == 2
    assert "2 of 2 jobs cannot be; none was started" in other["output"]
    assert "batch.size (8 there, 4 now)" in other["output"]


def test_all_jobs_that_cannot_be(posttrain_process: Run) -> None:
    """A mistake that only the data shows."""
    done = posttrain_process(*small("data.train=no.jsonl,none.jsonl"), verb="--multirun", launches=True)
    assert done["status"] == 2, done["output"]
    assert done["output"].count("posttrain: error: ") == 2


def test_a_signal_stops_the_sweep_and_it_goes_on(posttrain_process: Run) -> None:
    """The job that runs saves its checkpoint; those after it wait."""
    command = small("optim.lr=1e-4,1e-3", "train.steps=60")
    sent = ["posttrain.train:check_finite", 3, signal.SIGTERM]
    stopped = posttrain_process(*command, verb="--multirun", launches=True, send_up=sent)
    assert stopped["status"] == 143, stopped["output"]
    assert "the same command with run.dir=runs/sweeps/s goes on" in stopped["output"]
    assert [job["status"] for job in record()] == ["stopped", "waiting"]
    again = posttrain_process(*command, verb="--multirun", launches=True)
    assert again["status"] == 0, again["output"]
    assert again["output"].count("continues at step") == 1


# --- the table ---


@pytest.fixture
def made(run: Run) -> Callable[..., Sweep]:
    """A sweep whose jobs have run in this process."""

    def make(*overrides: str) -> Sweep:
        sweep = plan(small(*overrides))
        sweep.path.mkdir(parents=True)
        for job in sweep.jobs:
            run(*job.arguments)
            job.ended(0)
        return sweep

    return make


def test_the_best_comes_first_and_other_examples_are_apart(
    made: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = made("optim.lr=1e-2,1e-5", "data.eval=embedded:prompt_completion:20:held_out,embedded:prompt_completion:30")
    tell(sweep, Console())
    said = capsys.readouterr().out.split("4 of 4 runs, best first by nll")[1]
    names = [job.name for job in sweep.jobs]  # the second rate is the better one; the last two have other examples
    order = [names[1], names[0], names[3], names[2]]
    places = [said.index(f"  {name} ") for name in order]
    assert places == sorted(places)
    told = " ".join(said.split())
    assert told.count(f"with the baseline: 30 evaluation examples, 0 of them among {names[0]}'s 20") == 2
    assert "better" in said.splitlines()[2]
    assert f"warning: {names[2]} is not compared: other examples" in said
    numbers = json.loads((sweep.path / "compare.json").read_text())
    assert [each["name"] for each in numbers["runs"]] == names[:2]


def test_scores_that_are_measured_with_what_is_swept_over(
    made: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ("stage=dpo", "data.train=embedded:pairs:40", "data.eval=embedded:pairs:20:held_out")
    tell(made(*pairs, "stage.beta=0.1,0.5"), Console())
    said = capsys.readouterr().out
    assert "best first by pair_accuracy (higher is better)" in said
    assert "nll, by which each run chose its best checkpoint, is measured with stage.beta, which differs here" in said
    assert "warning: nll is measured with stage.beta, which differs" in said


def test_which_scores_are() -> None:
    def of(name: str, **settings: Any) -> dict[str, Any]:
        return {"stage": {"name": name, **settings}}

    assert measured_differently("nll", [of("dpo", beta=0.1), of("dpo", beta=0.1, nll_weight=1)]) == []
    assert measured_differently("nll", [of("dpo", beta=0.1), of("dpo", beta=0.2)]) == ["stage.beta"]
    assert measured_differently("objective", [of("gpro", form="dual"), of("gpro", form="pairwise")]) == ["stage.form"]
    assert measured_differently("nll", [of("sft"), of("dpo")]) == ["stage.name"]
    assert measured_differently("accuracy", [of("sft"), of("dpo")]) == []


# --- SLURM ---

NODE = """
import os, shutil, signal, sys, time
from pathlib import Path
from posttrain.launch import join_launch
join_launch()
target = Path(dict(a.split("=", 1) for a in sys.argv[1:])["run.dir"])
print("trains", target.name, flush=True)
if target.name == "lr=1e-3" and not Path("warned").exists():
    Path("warned").touch()
    signal.signal(signal.SIGTERM, lambda *_: (Path("saved").touch(), sys.exit(143)))
    for process in (os.getpid(), os.getppid()):  # SLURM warns every process of a job
        os.kill(process, signal.SIGUSR2)
    time.sleep(60)
if target.name == "lr=1e-2":
    sys.exit(2)
shutil.copytree("made/" + target.name, target)
"""
"""What stands for posttrain on the node: runs that were made before. The second is warned of its time limit once."""


@pytest.fixture
def node(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for lr in ("1e-4", "1e-3"):
        run(*FEW, f"optim.lr={lr}", f"run.dir=made/lr={lr}")
    Path("node.py").write_text(NODE)
    monkeypatch.setattr(slurm, "PROGRAM", (sys.executable, str(Path("node.py").resolve())))
    monkeypatch.setattr(slurm, "POLL_S", 0.1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_submitit_runs_the_jobs(node: None, capfd: pytest.CaptureFixture[str]) -> None:
    """By its own executor for one machine; a wait that is interrupted is taken up where it was."""
    submitit = pytest.importorskip("submitit")
    Path("warned").touch()
    sweep = plan(small("optim.lr=1e-4,1e-3,1e-2"))
    sweep.path.mkdir(parents=True)
    executor = submitit.LocalExecutor(folder=sweep.path.absolute() / "slurm")
    executor.update_parameters(timeout_min=2)
    submitted = slurm.submit(sweep, sweep.jobs, executor)
    assert all(job["slurm_job"] and job["status"] == "running" for job in record())
    slurm.wait(sweep, list(submitted.values()), Console())
    assert [(job["status"], job["exit_status"]) for job in record()] == [("done", 0), ("done", 0), ("failed", 2)]
    said = capfd.readouterr().out
    assert "lr=1e-2: failed, see " in said
    logs = next(Path(line.split("see ")[1].split(" (")[0]) for line in said.splitlines() if "see " in line)
    assert "trains lr=1e-2" in logs.with_suffix(".out").read_text()


def test_a_sweep_on_a_cluster(node: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With sbatch, srun and sacct that really start what they are given (tests/slurm_like.py)."""
    pytest.importorskip("submitit")
    slurm_like.install(Path("bin"))
    Path("state").mkdir()
    monkeypatch.setenv("SLURM_LIKE", str(Path("state").resolve()))
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    command = ["--multirun", *small("optim.lr=1e-4,1e-3"), "sweep.launcher=slurm", "sweep.partition=long"]
    assert cli.main([*command, "sweep.gpus=0", "sweep.timeout_minutes=30", "sweep.setup=[hostname]"]) == 0
    said = capfd.readouterr().out
    assert "2 submitted: 1001_0, 1001_1; logs in " in said
    assert "2 of 2 runs, best first by nll" in said
    assert [(job["status"], job["slurm_job"]) for job in record()] == [("done", "1001_0"), ("done", "1001_1")]
    assert Path("saved").exists()
    assert Path("state/1001_1.was-queued-again").exists()
    (script,) = Path("runs/sweeps/s/slurm").glob("*_submission.sh")
    asked = {line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"partition=long", "time=30", "nodes=1", "ntasks-per-node=1", "signal=USR2@120", "array=0-1%2"} <= asked
    assert not any(line.startswith("gpus") for line in asked)
    assert cli.main(command) == 0  # nothing is left to submit
    assert "submitted" not in capfd.readouterr().out


def test_no_cluster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["--multirun", *small("optim.lr=1e-4,1e-3"), "sweep.launcher=slurm"]) == 2
    assert "there is no sbatch, srun, sacct here" in capsys.readouterr().err


def test_without_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[slurm\]'"):
        slurm.check_cluster()
