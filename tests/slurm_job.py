"""A SLURM job of docker/slurm.sh on this machine: what SLURM would set and send, for the script and tests/docker/fake_slurm/."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT

SCRIPT = ROOT / "docker" / "slurm.sh"
FAKES = ROOT / "tests" / "docker" / "fake_slurm"


def free_job_id() -> int:
    """A job whose rendezvous port (20000 + id % 10000) is free."""
    for job in range(os.getpid() % 10000, 10000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", 20000 + job)):
                return job
    raise AssertionError("no free port")


@dataclass
class Job:
    """What SLURM sets for a job, and what it makes of the script's requests. bin: programs that stand before all others."""

    folder: Path
    nodes: int = 1
    variables: dict[str, str] = field(default_factory=lambda: {"SLURM_GPUS_ON_NODE": "1"})
    bin: Path | None = None
    starts: int = 0
    id: int = field(default_factory=free_job_id)
    process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> subprocess.Popen[bytes]:
        """The batch script on the first node, as after `sbatch` or a requeue; its output in out-N.txt."""
        places = [self.bin, FAKES, Path(sys.executable).parent, os.environ["PATH"]]
        names = ["localhost", "127.0.0.1"][: self.nodes]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": ":".join(str(place) for place in places if place),
            "PYTHONPATH": str(ROOT),
            "FAKE_SLURM": str(self.folder),
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_JOB_NODELIST": ",".join(names),
            **({"SLURM_RESTART_COUNT": str(self.starts)} if self.starts else {}),
            **self.variables,
        }
        self.starts += 1
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), *settings], stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        return self.process

    def run(self, *settings: str) -> tuple[int, str]:
        """Start it, wait for its end; status and output."""
        return self.end(self.start(*settings))

    def end(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        status = process.wait(300)
        return status, self.output.read_text()

    def signal(self, number: int, when: Callable[[], bool]) -> None:
        """To the script alone, as --signal=B: does, once `when` is true."""
        assert self.process is not None
        until = time.monotonic() + 300
        while not when() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.process.send_signal(number)

    @property
    def output(self) -> Path:
        return self.folder / f"out-{self.starts}.txt"

    def asked(self, what: str) -> list[str]:
        """The lines that a fake has written: requeued, scancel, images."""
        file = self.folder / what
        return file.read_text().splitlines() if file.is_file() else []
