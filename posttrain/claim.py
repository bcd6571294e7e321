"""A run's directory belongs to one process while that is alive: a lock that the system lets go of when the process dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from posttrain.disk import writing
from posttrain.errors import CheckpointError

LOCK = ".lock"
"""The file in a run's directory that is locked; what it says of its holder is for the error alone."""

LOOKS = 3
ADVICE = "set run.dir or run.root"


class Claim:
    """Holds at most one directory. Rank 0 takes it before it looks into it, and lets go when the run is over."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.made = False
        self.file: TextIO | None = None

    def make(self, path: Path) -> Path:
        """A new directory of this name, or with -2, -3, ... where that is taken; it is taken by making it."""
        number, free = 1, path
        with writing(path, ADVICE):
            path.parent.mkdir(parents=True, exist_ok=True)
            while self.path is None:
                try:
                    free.mkdir()
                    self.path, self.made = free, True
                except FileExistsError:
                    number += 1
                    free = path.with_name(f"{path.name}-{number}")
        return free

    def take(self, path: Path) -> None:
        """Lock the directory, which is made where there is none; CheckpointError where another process holds it."""
        if self.path is None:
            with writing(path, ADVICE):
                self.made = not path.is_dir()
                path.mkdir(parents=True, exist_ok=True)
            self.path = path
        while self.file is None:
            try:
                file = (path / LOCK).open("a+", encoding="utf-8")
            except OSError:
                return  # what can really not be written will be told by what is written
            try:
                _lock(file)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                self.path, self.made = None, False
                raise CheckpointError(
                    f"run.dir={path} is in use by {holder}, which is still running; wait for it or stop it (the same command "
                    "then goes on), or give another run.dir"
                ) from None
            except OSError:  # this file system has no locks
                file.close()
                (path / LOCK).unlink(missing_ok=True)
                return
            if _is_that(file, path / LOCK):
                self.file = file
            else:  # its holder took it away just then
                file.close()
        with suppress(OSError):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.file.flush()

    def release(self) -> None:
        """Let go; a directory that was made and holds nothing is taken away again."""
        if self.file is not None and self.path is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                self.file.close()
        if self.path is not None and self.made:
            with suppress(OSError):  # not empty
                self.path.rmdir()
        self.path, self.file, self.made = None, None, False


def _is_that(file: TextIO, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(file.fileno())
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _lock(file: TextIO) -> None:
    """BlockingIOError where another process holds it; who only looks whether one does (report/recorded.py) is soon gone."""
    for _ in range(LOOKS):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
