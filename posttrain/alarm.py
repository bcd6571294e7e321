"""When one rank fails, all end, and its error is the one that is told.

Otherwise the others wait in a collective: with NCCL until its time limit, with gloo until the lost connection gives them an
error of their own, under which the cause is buried. So a rank that fails says so through the launch's key-value store, which
every rank watches from a thread.
"""

from __future__ import annotations

import os
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

_runs = count()


class Alarm:
    """One per run and rank. It listens from its making until `stop`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.stopped = threading.Event()
        # a launcher that restarts the ranks keeps its store, and a process may hold several runs, one after another
        self.prefix = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        self.hosted = dist.distributed_c10d._get_default_store()  # on rank 0 perhaps the server itself
        self.store = self._connect(30.0)
        threading.Thread(target=self._listen, daemon=True).start()

    def ring(self, message: str) -> tuple[int, str] | None:
        """Say that this rank failed. (rank, message) of the one that failed first, None if this one did.

        A store that is gone went with rank 0, whose error is not known here: this one is then told.
        """
        self.stopped.set()
        with suppress(Exception):
            if self.store.add("rung", 1) == 1:
                self.store.set("first", f"{self.rank} {message}")
                self.store.add("heard", 1)
                return None
            rank, _, told = self.store.get("first").decode().partition(" ")
            self.store.add("heard", 1)
            return int(rank), told
        return None

    def linger(self) -> None:
        """After `ring`, on rank 0: where it holds the store, the others must have heard before it goes."""
        until = time.monotonic() + GRACE_S + 2 * POLL_S
        while self.rank == 0 and self.store.add("heard", 0) < self.world and time.monotonic() < until:
            time.sleep(POLL_S / 5)

    def stop(self) -> None:
        """The run is over: whatever happens to the other ranks from here on is no longer this one's."""
        self.stopped.set()

    def _connect(self, timeout_s: float) -> dist.Store:
        """A connection of its own, for the group's is held while it waits; it outlives the group."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return dist.PrefixStore(self.prefix, store)

    def _listen(self) -> None:
        lost = None
        while not self.stopped.wait(POLL_S):
            try:
                if self.store.check(["first"]):
                    break
            except Exception as error:  # a network that falters, or a store that went with rank 0 or the launcher
                lost = self._look_again(error)
                if lost:
                    break
        if not self.stopped.wait(GRACE_S):
            if lost:
                print(lost, file=sys.stderr, flush=True)
            with suppress(Exception):
                self.store.add("heard", 1)
            os._exit(1)

    def _look_again(self, error: Exception) -> str | None:
        """Connect anew and go on listening; where that fails too, why this rank is to end."""
        with suppress(Exception):
            self.store = self._connect(CONNECT_S)
            return None
        place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines() or [""]
        return (
            f"posttrain: rank {self.rank} ends: the launch's store at {place} is gone ({reason[0]}), and with it rank 0 or the "
            "launcher"
        )
