"""Before anything is read: as many ranks as were meant, that meet in time and were told the same."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ConfigError
from posttrain.startup import check_not_alone

Run = Callable[..., Any]
TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
"""As torchrun sets it for 2 nodes of 4."""

ALONE = {
    "srun starts python on each node": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, 0, "2 tasks were started"),
    "srun starts two on one node": ({"SLURM_STEP_NUM_TASKS": "2"}, 0, "run.processes=1 if that is meant"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, 0, "4 tasks were started, but nothing tells them of each other"),
    "another mpirun": ({"PMI_SIZE": "4"}, 0, "4 tasks were started"),
    "torchrun on each node by itself": (
        TORCHRUN | {"WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}, 0,
        "the job has 2 nodes, but this run's 4 processes are on one",
    ),
    "sbatch without srun": ({"SLURM_JOB_NUM_NODES": "3"}, 0, "the job has 3 nodes, but this run's 1 process is on one"),
    "fewer than were meant": ({"SLURM_JOB_NUM_NODES": "2"}, 8, "give torchrun --nnodes 2"),
}  # fmt: skip

FINE = {
    "a laptop": ({}, 0),
    "torchrun --standalone": (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, 0),
    "torchrun over two nodes": (TORCHRUN, 0),
    "srun, one torchrun a node": (TORCHRUN | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}, 0),
    "srun starts the ranks, told of each other": (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, 0),
    "one node of SLURM": ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_NUM_NODES": "1"}, 0),
    "one task of a larger job": ({"SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_NUM_NODES": "4"}, 0),
    "an empty variable": ({"SLURM_STEP_NUM_NODES": "", "SLURM_STEP_NUM_TASKS": ""}, 0),
    "as is meant": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, 1),
    "one node of a job, as is meant": (TORCHRUN | {"WORLD_SIZE": "4", "SLURM_JOB_NUM_NODES": "2"}, 4),
}  # fmt: skip


@pytest.mark.parametrize("how", ALONE)
def test_who_would_train_alone(how: str) -> None:
    environment, expected, said = ALONE[how]
    with pytest.raises(ConfigError, match=said):
        check_not_alone(environment, expected or None)


@pytest.mark.parametrize("how", FINE)
def test_who_does_not(how: str) -> None:
    environment, expected = FINE[how]
    check_not_alone(environment, expected or None)


def test_a_run_that_would_train_alone_is_refused(posttrain_process: Run) -> None:
    done = posttrain_process("run.dir=r", each=[{"environment": {"SLURM_STEP_NUM_NODES": "2"}}])
    assert done["status"] == 2, done["output"]
    assert done["output"].startswith("posttrain: error: the job has 2 nodes")
    assert not Path("r").exists()


def the_one_error(done: dict[str, Any]) -> str:
    """What both ranks end with, told by one of them and before anything is written."""
    assert done["statuses"] == [2, 2], done["output"]
    assert "Traceback" not in done["output"]
    assert not Path("r").exists()
    (message,) = [line for line in done["output"].splitlines() if line.startswith("posttrain: error: ")]
    return message


def test_other_settings_on_a_rank(posttrain_process: Run) -> None:
    done = posttrain_process("run.dir=r", ranks=2, each=[{}, {"arguments": ["optim.lr=2e-4", "train.seed=1"]}])
    host = socket.gethostname()
    other = f"rank 1 on {host} has other settings than rank 0 on {host}: "
    differ = "optim.lr 0.0002 there, 0.0001 on rank 0, train.seed 1 there, 42 on rank 0; start every rank"
    assert other + differ in the_one_error(done)


def test_other_versions_on_a_rank(posttrain_process: Run, tmp_path: Path) -> None:
    """A numpy of its own, first on its path."""
    import numpy

    (tmp_path / "numpy-0.1.dist-info").mkdir()
    (tmp_path / "numpy-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    done = posttrain_process("run.dir=r", ranks=2, on_rank=1, first_path=str(tmp_path))
    differ = f"numpy 0.1 there, {numpy.__version__} on rank 0"
    assert f"has other versions than rank 0 on {socket.gethostname()}: {differ}" in the_one_error(done)


def test_other_data_on_a_rank(posttrain_process: Run, tmp_path: Path) -> None:
    """The same path, a file that differs in one answer."""
    folders = [tmp_path / name for name in ("zero", "one")]
    for folder, answer in zip(folders, ("4", "5"), strict=True):
        folder.mkdir()
        rows = [{"prompt": f"{n}+2=", "completion": answer if n == 2 else str(n + 2)} for n in range(40)]
        (folder / "d.jsonl").write_text("".join(str(row).replace("'", '"') + "\n" for row in rows))
    each = [{"folder": str(folder)} for folder in folders]
    done = posttrain_process("data.train=d.jsonl", "data.eval=", f"run.dir={tmp_path}/r", ranks=2, each=each)
    host = socket.gethostname()
    differ = f"rank 1 on {host} reads other data than rank 0 on {host}: the files of data.train or data.eval differ"
    assert differ in the_one_error(done)
    each[1] = each[0]
    same = posttrain_process("data.train=d.jsonl", "data.eval=", f"run.dir={tmp_path}/r", ranks=2, each=each)
    assert same["statuses"] == [0, 0], same["output"]
    assert same["output"].count("2 processes (DDP, gloo)") == 1
    assert "CPU (1 threads), fp32, 2 processes (DDP, gloo)" in same["output"]


def waited(output: str, ranks: tuple[int, ...], port: str = "") -> None:
    """One of `ranks` said so."""
    who = [
        f"posttrain: error: rank {rank} of 2 on {socket.gethostname()} has waited 3 s for the first sum"
        for rank in ranks
    ]
    assert any(line in output for line in who), output
    assert f"Their store is at 127.0.0.1:{port}" in output
    assert "NCCL_SOCKET_IFNAME=unset, GLOO_SOCKET_IFNAME=unset" in output
    assert "distribution.connect_seconds gives it longer" in output


def test_a_rank_that_never_comes(posttrain_process: Run) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in (0, 1):  # whose store it is, and who looks for it
        environment = launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        done = posttrain_process("distribution.connect_seconds=3", "run.dir=r", each=[{"environment": environment}])
        assert done["status"] == 1, done["output"]
        assert done["seconds"] < 20
        waited(done["output"], (rank,), port)
        assert not Path("r").exists()


def test_a_rank_that_joins_but_is_late_for_the_first_sum(posttrain_process: Run) -> None:
    options = ["distribution.connect_seconds=3", "run.dir=r"]
    done = posttrain_process(*options, ranks=2, on_rank=1, hang="posttrain.runtime:Runtime.global_sum")
    assert done["statuses"] == [1, 1], done["output"]
    assert done["seconds"] < 20
    waited(done["output"], (0, 1))  # whose clock ran out first; the other may only have lost its connection


def test_a_rank_that_dies_before_the_first_sum(posttrain_process: Run) -> None:
    """The other is told in a line, not by the collective's own words alone."""
    done = posttrain_process("run.dir=r", ranks=2, on_rank=1, exit="posttrain.runtime:Runtime.global_sum")
    assert done["statuses"] == [1, 7], done["output"]
    assert "posttrain: error: rank 0 of 2 on " in done["output"]
    assert "cannot join the others (" in done["output"]
    assert "Traceback" not in done["output"]
