"""Several ranks are one run: the numbers of one process, kills and signals that they all survive, an error that ends them all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, small_arguments
from test_resume import STAGES as RESUMED
from test_resume import assert_same_run
from test_train import LOSSES, SCORES, STAGES, WEIGHTS, assert_same_weights, log, losses

Run = Callable[..., Any]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
"""--standalone: a free port, so that two launches on a machine do not meet."""


def summary(run_dir: str) -> dict[str, Any]:
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
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/STAGE and two/STAGE: every stage of the list by one process and by two ranks, made in one launch each."""
    return tmp_path_factory.mktemp("both")


def ran(both: Path, mixture: None) -> Path:
    if (both / "done").exists():
        return both
    here = Path.cwd()
    for ranks in ("one", "two"):
        (both / ranks).mkdir()
    tasks = {}
    for ranks in ("one", "two"):
        tasks[ranks] = [
            ["train", *small_arguments("train.steps=10", "train.eval_every=10", "batch.size=7", "optim.lr=1e-5",
             *options, f"run.dir={both / ranks / stage.replace(' ', '-')}")]
            for stage, options in STAGES.items()
        ]  # fmt: skip
        Path(f"{ranks}.json").write_text(json.dumps(tasks[ranks]))
    status, said = finish(launch(str(ROOT / "tests" / "rank_runs.py"), "two.json"))
    assert status == 0, said
    assert said.count("2 processes (DDP)") == len(STAGES)
    command = [sys.executable, str(ROOT / "tests" / "rank_runs.py"), "one.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    (both / "done").touch()
    return both


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_what_one_does(both: Path, mixture: None, stage: str) -> None:
    """7 examples a step, so that the ranks' shares differ."""
    made = ran(both, mixture)
    one, two = (made / ranks / stage.replace(" ", "-") for ranks in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=LOSSES)
    assert_same_weights(one, two, WEIGHTS)
    a, b = summary(str(one)), summary(str(two))
    for metric in ("nll", "perplexity", "token_accuracy", "brier", "ece"):
        for field in ("value", "low", "high", "se"):
            if a["start"][metric][field] is not None:
                assert b["start"][metric][field] == pytest.approx(a["start"][metric][field], rel=SCORES), metric
    assert b["metrics"]["nll"]["value"] == pytest.approx(a["metrics"]["nll"]["value"], rel=1e-4)
