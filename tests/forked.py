"""What posttrain starts (posttrain/launch.py), forked from a process that has already imported everything: a launch of two ranks
would otherwise import torch three times over. Sessions, signals, statuses and pipes are the real ones."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any


class Forked:
    """As much of a Popen as posttrain.launch uses."""

    def __init__(self, command: list[str], environment: Mapping[str, str], silent: bool, befall: Callable[[], None]):
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 99
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            if silent:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(environment)
            befall()
            from posttrain.cli import main

            status = main(command[command.index("posttrain") + 1 :])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, ended = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(ended) if done else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_launches(befall: Callable[[int], None]) -> None:
    """From here on launches of this process fork. befall: called in each rank, with its number."""
    from posttrain.launch import Launch

    def start(self: Any, rank: int, environment: Mapping[str, str]) -> Forked:
        return Forked(self.command, environment, rank > 0, lambda: befall(rank))

    Launch._start = start  # type: ignore[assignment, method-assign]
