"""When one rank fails, all end, and its error is the one that is told.

Otherwise the others wait in a collective: with NCCL until its time limit, with gloo until the lost connection gives them an
error of their own, under which the cause is buried. So a rank that fails says so through the launch's key-value store, which
every rank watches from a thread.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist

POLL_S = 0.5
GRACE_S = 8.0
"""What a rank that hears of another's failure gets to end by itself, before it is ended."""

_runs = count()


class Alarm:
    """One per run and rank. It listens from its making until `stop`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.stopped = threading.Event()
        # a launcher that restarts the ranks keeps its store, and a process may hold several runs, one after another
        prefix = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        # a connection of its own, for the group's is held while it waits; it outlives the group
        self.hosted = dist.distributed_c10d._get_default_store()  # on rank 0 perhaps the server itself
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=30), wait_for_workers=False)
        self.store = dist.PrefixStore(prefix, store)
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

    def _listen(self) -> None:
        while not self.stopped.wait(POLL_S):
            try:
                heard = self.store.check(["first"])
            except Exception:  # the store is gone, and with it rank 0 or the launcher
                heard = True
            if heard:
                break
        if not self.stopped.wait(GRACE_S):
            with suppress(Exception):
                self.store.add("heard", 1)
            os._exit(1)
