"""When one rank fails, all end, and its error is the one that is told.

Otherwise the others wait in a collective: with NCCL until its time limit, with gloo until the lost connection gives them an
error of their own, under which the cause is buried. So a rank that fails says so through the launch's key-value store, which
every rank watches from a thread. A machine that dies, or a network that does, says nothing and closes no connection: so every
rank says through the store that it is there, rank 0 counts, and the others see whether the store answers.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist

POLL_S = 0.5
CONNECT_S = 10.0
"""Time to find the store again where a look into it failed: a network may falter."""

GRACE_S = 8.0
"""What a rank that hears of another's failure gets to end by itself, before it is ended."""

BEAT_S = 5.0
SILENT_S = 45.0
"""So long a rank, or the store, may say nothing. Networks falter, and a rank within one long call into C says nothing either."""

OVER = -(2**40)
"""Added to a rank's beats where its run is over."""

AGAIN = "start all ranks again with the run's run.dir: it continues at its last checkpoint"

_runs = count()


def lost_connection(error: Exception) -> str | None:
    """What a collective says that lost another rank, in one line; None of any other error."""
    said = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not ("gloo/transport" in said or "ncclRemoteError" in said):
        return None
    return re.sub(r"^\[\S*gloo/transport\S*\] ", "", said).partition(". This is typically")[0]


class Alarm:
    """One per run and rank. It listens from its making until `stop`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.stopped = threading.Event()
        # a launcher that restarts the ranks keeps its store, and a process may hold several runs, one after another
        self.prefix = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        self.hosted = dist.distributed_c10d._get_default_store()  # on rank 0 perhaps the server itself
        self.store = self._connect(30.0)
        self.store.set(f"host/{rank}", socket.gethostname())
        self.unanswered = 0  # looks' times since the store last answered
        self.beats = dict.fromkeys(range(1, world), 0) if rank == 0 else {}
        self.silent = dict.fromkeys(self.beats, 0)
        for task in (self._listen, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def ring(self, message: str) -> tuple[int, str] | None:
        """Say that this rank failed. (rank, message) of the one that failed first, None if this one did.

        A store that is gone went with rank 0, whose error is not known here: this one is then told.
        """
        self.stopped.set()
        limit = threading.Timer(2 * GRACE_S, self._end, [message])  # over a dead network no answer comes
        limit.daemon = True
        limit.start()
        try:
            if self.store.add("rung", 1) == 1:
                self.store.set("first", f"{self.rank} {message}")
                self.store.add("heard", 1)
                return None
            rank, _, told = self.store.get("first").decode().partition(" ")
            self.store.add("heard", 1)
            return int(rank), told
        except Exception:
            return None
        finally:
            limit.cancel()

    def linger(self, lost: bool = False) -> None:
        """After `ring`, on rank 0: where it holds the store, the others must have heard before it goes. lost: one never will."""
        until = time.monotonic() + (4 * POLL_S if lost else GRACE_S + 2 * POLL_S)
        while self.rank == 0 and self.store.add("heard", 0) < self.world and time.monotonic() < until:
            time.sleep(POLL_S / 5)

    def stop(self) -> None:
        """The run is over: whatever happens to the other ranks from here on is no longer this one's."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        with suppress(Exception):
            self.store.add(f"beats/{self.rank}", OVER)

    def _connect(self, timeout_s: float) -> dist.Store:
        """A connection of its own, for the group's is held while it waits; it outlives the group."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return dist.PrefixStore(self.prefix, store)

    def _listen(self) -> None:
        lost, beat = None, 0.0
        while not self.stopped.wait(POLL_S):
            try:
                if self.store.check(["first"]):
                    break
                if time.monotonic() >= beat:
                    beat = time.monotonic() + BEAT_S
                    self._count()
                self.unanswered = 0
            except Exception as error:  # a network that falters, or a store that went with rank 0 or the launcher
                if not self.stopped.is_set() and (lost := self._look_again(error)):
                    break
        if not self.stopped.wait(GRACE_S):
            if not lost:
                with suppress(Exception):
                    self.store.add("heard", 1)
            self._end(lost)

    def _count(self) -> None:
        """Say that this rank is there; on rank 0, see that the others are. One that has not begun is the start's matter."""
        self.store.add(f"beats/{self.rank}", 1)
        for rank, before in self.beats.items():
            now = self.store.add(f"beats/{rank}", 0)
            self.silent[rank] = self.silent[rank] + 1 if now == before and now > 0 else 0
            self.beats[rank] = now
        silent = [rank for rank, times in self.silent.items() if times * BEAT_S >= SILENT_S]
        if silent and not self.stopped.is_set():
            host = self.store.get(f"host/{silent[0]}").decode()
            message = (
                f"rank {silent[0]} on {host} has said nothing for {SILENT_S:g} s: its machine is down, or the network to it; "
                f"{AGAIN}"
            )
            if self.ring(message) is None:
                print(f"posttrain: error: {message}", file=sys.stderr, flush=True)
            self.linger(lost=True)
            self._end(None)

    def _watch(self) -> None:
        """A look waits for its answer without a limit, so it takes another thread to see that none comes."""
        while not self.stopped.wait(POLL_S):
            self.unanswered += 1
            if self.unanswered * POLL_S >= SILENT_S:
                self._end(
                    f"rank {self.rank} ends: the launch's store at {self._place()} has not answered for {SILENT_S:g} s: the "
                    f"machine of rank 0 is down, or the network to it; {AGAIN}"
                )

    def _look_again(self, error: Exception) -> str | None:
        """Connect anew and go on listening; where that fails too, why this rank is to end."""
        with suppress(Exception):
            self.store = self._connect(CONNECT_S)
            return None
        reason = str(error).splitlines() or [""]
        return (
            f"rank {self.rank} ends: the launch's store at {self._place()} is gone ({reason[0]}), and with it rank 0 or the "
            f"launcher; {AGAIN}"
        )

    def _place(self) -> str:
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def _end(self, message: str | None) -> None:
        """This process, whatever it waits for."""
        if message:
            print(f"posttrain: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)
