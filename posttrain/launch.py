"""run.processes=N without a launcher: one process a rank on this machine, as torchrun would start them.

The parent trains nothing and imports nothing heavy. Each rank is a session of its own, so that a terminal's Ctrl-C reaches the
parent alone, which passes it on once. A rank that dies takes the others along within seconds; so does the parent, however it
ends. What the ranks say goes where the parent's own words go.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from posttrain.errors import ConfigError

PROGRAM = (sys.executable, "-u", "-m", "posttrain")
LAUNCHER = "POSTTRAIN_LAUNCHER"
"""In a rank's environment: the process that started it."""

PASSED_ON = (signal.SIGINT, signal.SIGTERM)
POLL_S = 0.1
GRACE_S = 30.0
"""What the others get to end by themselves when one rank has failed: longer than the alarm that ends them (alarm.py), and
time for a tracker to be closed. When a rank was killed they get nothing: they could only wait for it."""

PR_SET_PDEATHSIG = 1

_ours = False


def has_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, accelerate or `launch` started this process."""
    return "WORLD_SIZE" in environment or "RANK" in environment


def launch(
    arguments: Sequence[str],
    processes: int,
    program: Sequence[str] = PROGRAM,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Run `posttrain ARGUMENTS` as so many ranks, or as one plain process; returns the exit status of the run."""
    return Launch([*program, *arguments], environments(processes, say)).run()


def environments(processes: int, say: Callable[[str], None]) -> list[dict[str, str]]:
    """What each rank finds in its environment beside this process's own."""
    parent = {LAUNCHER: str(os.getpid())}
    if processes == 1:
        return [parent]
    same = parent | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    told = ""
    if "OMP_NUM_THREADS" not in os.environ:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        same["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
        told = (
            f", OMP_NUM_THREADS={same['OMP_NUM_THREADS']} each: {cpus} CPU{'s' if cpus > 1 else ''} shared among them"
        )
    say(f"starting {processes} processes on this machine{told}")
    return [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class Launch:
    """The processes of one run. signals: those that came for this process and were passed on to them."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self.command, self.environments = list(command), environments
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []
        self._waiting: list[int] = []

    def run(self) -> int:
        """Start them and wait for them; returns the exit status of the run."""
        with self._listening():
            try:
                for rank, environment in enumerate(self.environments):
                    self.processes.append(self._start(rank, environment))
                return self._wait()
            finally:
                self._kill()

    def stop(self, number: int) -> None:
        """Pass this signal on and wait until all have followed it; for a handler that interrupts `run`, which may just be
        holding the lock of Popen.wait."""
        self._waiting.append(number)
        self._pass_on()
        for process in self.processes:
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def _start(self, rank: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            env={**os.environ, **environment},
            stdin=None if rank == 0 else subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait(self) -> int:
        ended: dict[int, int] = {}
        failed: tuple[int, int] | None = None
        until = float("inf")
        while len(ended) < len(self.processes):
            self._pass_on()
            for rank, process in enumerate(self.processes):
                if rank in ended or (code := process.poll()) is None:
                    continue
                ended[rank] = code
                if code and failed is None:
                    failed = (rank, code)
                    until = time.monotonic() + self._patience(code)
            if time.monotonic() >= until:
                self._kill()
            time.sleep(POLL_S)
        return self._status(*failed) if failed else 0

    def _patience(self, code: int) -> float:
        """Seconds for the others, after one has ended like this: all they need where all were asked to stop."""
        if self._as_asked(code):
            return float("inf")
        return GRACE_S if code > 0 else 0.0

    def _as_asked(self, code: int) -> bool:
        """Whether a process that ends like this has followed a signal that was passed on."""
        return any(code in (-number, 128 + number) for number in self.signals)

    def _status(self, rank: int, code: int) -> int:
        """Of the run, by the first rank that failed."""
        if code > 0 or self._as_asked(code):
            return code if code > 0 else 128 - code
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        which = f"rank {rank} (process {self.processes[rank].pid})" if len(self.processes) > 1 else "the run's process"
        others = "; the other ranks were ended" if len(self.processes) > 1 else ""
        print(f"posttrain: error: {which} was killed by {name}{why}{others}", file=sys.stderr, flush=True)
        return 1

    def _pass_on(self) -> None:
        while self._waiting:
            number = self._waiting.pop(0)
            self.signals.append(number)
            for process in self.processes:
                process.send_signal(number)  # to those that have ended it does nothing

    def _kill(self) -> None:
        """End what still runs, with the processes it has started."""
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals wait for the loop within this block, one that comes between two starts too. Outside the main thread they
        stay as they are."""

        def handle(number: int, frame: Any) -> None:
            self._waiting.append(number)

        try:
            old = {number: signal.signal(number, handle) for number in PASSED_ON}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def join_launch() -> None:
    """In a rank that `launch` started: the system ends it when its launcher is gone, however that ended."""
    global _ours
    launcher = os.environ.pop(LAUNCHER, None)  # what this process starts in turn is none of the launcher's
    if launcher is None:
        return
    _ours = True
    signal.signal(
        signal.SIGUSR2, signal.SIG_IGN
    )  # SLURM's warning to all processes of a job is the launcher's to act on
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it went before the line above
        os._exit(1)


def check_devices() -> None:
    """ConfigError in a rank that `launch` started where there are fewer GPUs than ranks: no two of them can share one."""
    if not _ours or not has_launcher():
        return
    import torch  # by now the stage has imported it

    ranks, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if 0 < devices < ranks:
        raise ConfigError(
            f"run.processes={ranks}, but this machine shows {devices} GPU{'s' if devices > 1 else ''} and each process needs "
            f"its own; set run.processes={devices}, or CUDA_VISIBLE_DEVICES= (empty) in the environment to train on the CPU"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
