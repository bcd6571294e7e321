"""docker/slurm.sh under srun, scontrol and scancel of our own (fake_slurm/), which start real processes on this machine.

Two nodes are `localhost` and `127.0.0.1`: names under which each reaches the other.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import small_arguments
from slurm_job import SCRIPT, Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(**what: object) -> Job:
        made.append(Job(tmp_path, **what))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        if each.process is not None and each.process.poll() is None:
            each.process.kill()
            for task in each.asked("tasks"):
                os.kill(int(task), signal.SIGKILL)


# --- real launchers, real ranks ---


@pytest.mark.long
def test_two_nodes_are_one_run_that_is_stopped_requeued_and_goes_on(job: Callable[..., Job]) -> None:
    ours = job(nodes=2)
    settings = small_arguments("train.steps=60", "run.dir=")
    first = ours.start(*settings)
    ours.signal(signal.SIGUSR1, lambda: "step 3/" in ours.output.read_text())
    status, said = ours.end(first)
    assert status != 0, said
    assert ours.asked("scancel") == [f"--signal=TERM {ours.id}"]
    assert ours.asked("requeued") == [str(ours.id)], said
    run = Path(f"runs/slurm-{ours.id}")
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert 3 <= step < 60
    assert f"stopped by signal {int(signal.SIGTERM)}" in said

    status, said = ours.run(*settings)
    assert status == 0, said
    assert "2 processes (DDP, gloo)" in said
    assert f"continues at step {step}" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 61))
    assert json.loads((run / "summary.json").read_text())["steps"] == 60
    assert len(ours.asked("requeued")) == 1
    assert [path.name for path in Path("runs").iterdir()] == [run.name]


# --- what the script makes of sizes, statuses and signals: the launcher is one of our own ---

TORCHRUN = """#!/usr/bin/env bash
echo "$OMP_NUM_THREADS $TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*" >>"$FAKE_SLURM/torchrun"
end() { if [[ -n ${SAVES:-} ]]; then mkdir -p "$SAVES/checkpoints/step-000007"; fi; exit "${TORCHRUN_STATUS:-1}"; }
trap end TERM
touch "$FAKE_SLURM/training"
while [[ -n ${TRAINS:-} ]]; do sleep 0.02; done
TORCHRUN_STATUS=${TORCHRUN_STATUS:-0}
end
"""
POSTTRAIN = """#!/usr/bin/env bash
echo "$*" >>"$FAKE_SLURM/posttrain"
exit "${POSTTRAIN_STATUS:-0}"
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`torchrun` and `posttrain` that note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"torchrun": TORCHRUN, "posttrain": POSTTRAIN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("variables", "processes", "threads"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}, 4, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:8", "SLURM_CPUS_PER_TASK": "8"}, 8, 1),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "h100:4"}, 4, 1),
        ({"SLURM_CPUS_PER_TASK": "3"}, 1, 3),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1, 1),
    ],
)
def test_sizes_are_slurms(
    job: Callable[..., Job],
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    processes: int,
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ours = job(nodes=2, bin=programs, variables=variables)
    status, said = ours.run("model=smollm2_135m", "data.columns.prompt=a b")
    assert status == 0, said
    settings = f"run.processes={2 * processes} model=smollm2_135m data.columns.prompt=a b run.dir=runs/slurm-{ours.id}"
    assert ours.asked("posttrain") == [f"prepare {settings}"]  # once, on one node
    called = ours.asked("torchrun")
    assert len(called) == 2
    for line in called:
        assert line.startswith(f"{threads} 240 --nnodes=2 --nproc_per_node={processes} ")
        assert f"--rdzv_backend=c10d --rdzv_id={ours.id}-0 --rdzv_endpoint=localhost:{20000 + ours.id} " in line
        assert line.endswith(f" -m posttrain {settings}")
    assert sorted(re.findall(r"--local_addr=(\S+) .*is_host=(\d)", "\n".join(called))) == [
        ("127.0.0.1", "0"),
        ("localhost", "1"),
    ]


def test_the_settings_own_directory_and_an_image(job: Callable[..., Job], programs: Path) -> None:
    ours = job(bin=programs, variables={"POSTTRAIN_IMAGE": "/images/posttrain.sif"})
    status, said = ours.run("run.dir=runs/mine")
    assert status == 0, said
    assert ours.asked("posttrain")[0].startswith("prepare run.processes=1 run.dir=runs/mine")
    assert ours.asked("images") == ["/images/posttrain.sif /cache"] * 2
    assert ours.asked("torchrun")[0].endswith("-m posttrain run.processes=1 run.dir=runs/mine")


def test_a_stream_has_nothing_to_prepare(job: Callable[..., Job], programs: Path) -> None:
    ours = job(bin=programs)
    assert ours.run("data.streaming=true", "train.steps=9")[0] == 0
    assert ours.asked("posttrain") == []
    assert len(ours.asked("torchrun")) == 1


@pytest.mark.parametrize(
    ("statuses", "told", "launched"),
    [
        ({"POSTTRAIN_STATUS": "2"}, 2, False),  # a mistake in the config: nothing is launched for it
        ({"TORCHRUN_STATUS": "1"}, 1, True),
        ({"TORCHRUN_STATUS": "1", "SAVES": "run"}, 1, True),  # it would fail again
        ({"TORCHRUN_STATUS": "0", "SAVES": "run"}, 0, True),
    ],
)
def test_an_end_without_notice_is_no_requeue(
    job: Callable[..., Job], programs: Path, statuses: dict[str, str], told: int, launched: bool
) -> None:
    ours = job(bin=programs, variables=statuses)
    status, said = ours.run("train.steps=5", "run.dir=run")
    assert status == told, said
    assert Path("run/checkpoints").is_dir() == ("SAVES" in statuses)
    assert bool(ours.asked("torchrun")) == launched
    assert ours.asked("requeued") == []


@pytest.mark.parametrize(("saves", "requeued"), [(True, True), (False, False)])
def test_a_notice_requeues_a_run_that_has_saved(
    job: Callable[..., Job], programs: Path, saves: bool, requeued: bool
) -> None:
    """One that comes no further would be requeued for ever; a checkpoint of an earlier start does not count."""
    run_dir = Path.cwd() / "run"
    (run_dir / "checkpoints" / "step-000003").mkdir(parents=True)
    ours = job(bin=programs, nodes=2, variables={"TRAINS": "yes", **({"SAVES": str(run_dir)} if saves else {})})
    started = ours.start(f"run.dir={run_dir}")
    ours.signal(signal.SIGUSR1, lambda: len(ours.asked("torchrun")) == 2 and (ours.folder / "training").exists())
    status, said = ours.end(started)
    assert status == 1
    assert ours.asked("requeued") == ([str(ours.id)] if requeued else []), said
    assert ("saved, and requeued" in said) == requeued
    assert ("no checkpoint was saved since this start" in said) != requeued


def test_a_cancelled_job_saves_and_stays_ended(job: Callable[..., Job], programs: Path) -> None:
    """SLURM sends SIGTERM to the script and to the steps; the script must not end before them."""
    run_dir = Path.cwd() / "run"
    ours = job(bin=programs, variables={"TRAINS": "yes", "SAVES": str(run_dir)})
    started = ours.start(f"run.dir={run_dir}")
    ours.signal(signal.SIGTERM, lambda: (ours.folder / "training").exists())
    time.sleep(0.2)
    assert started.poll() is None
    for task in ours.asked("tasks"):
        os.kill(int(task), signal.SIGTERM)
    status, said = ours.end(started)
    assert status == 1
    assert (run_dir / "checkpoints" / "step-000007").is_dir()
    assert ours.asked("requeued") == ours.asked("scancel") == [], said


def test_a_verb_is_refused(job: Callable[..., Job], programs: Path) -> None:
    ours = job(bin=programs)
    assert ours.run("eval", "run.dir=r") == (
        2,
        "slurm.sh: eval is no setting; this script trains: give settings, key=value\n",
    )


def test_the_notice_is_longer_than_what_torchrun_waits() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    (notice,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    (waits,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)}", text)
    assert int(waits) + 60 <= int(notice)
