"""A run's ranks end together: by an error on one of them, told once, or by reaching the end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from posttrain.alarm import AGAIN, lost_connection
from posttrain.errors import Stopped, TrainingError, tell_here
from posttrain.joining import leave
from posttrain.runtime import Runtime


@contextmanager
def together(runtime: Runtime, closing: bool = True) -> Iterator[None]:
    """The run itself: an error on one rank ends all, and is told once, by the rank that met it first. closing: the run is
    over with this block."""
    try:
        yield
    except Stopped:  # by all ranks after the same step
        runtime.close()
        raise
    except Exception as error:
        said = lost_connection(error)
        if said is None:
            _fail(runtime, error)
            raise
        lost = TrainingError(
            f"rank {runtime.rank} on {socket.gethostname()} lost another rank, which ended, or was killed, without a word: its "
            f"own output, or its machine's log, may say why ({said}); {AGAIN}"
        )
        _fail(runtime, lost, lost=True)
        raise lost from error
    if closing:
        runtime.close()


def _fail(runtime: Runtime, error: Exception, lost: bool = False) -> None:
    """Tell the other ranks, or the error that another rank told before; then leave, so that none waits for this one.

    lost: another is gone.
    """
    alarm = runtime.alarm
    if alarm:
        with suppress(ValueError):  # outside the main thread
            # the launcher, which may see the same, would end this process before it has told its error
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = alarm.ring(f"{type(error).__name__}: {error}") if alarm else None
    runtime.close()
    if alarm is None:
        return
    tell_here(error, first is None)
    if first:
        error.add_note(f"rank {first[0]} had failed before: {first[1]}")
    if runtime.device.type == "cpu":  # NCCL would wait for what is under way
        leave()
    alarm.linger(lost)
