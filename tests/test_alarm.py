"""A rank hears of another's failure, also over a network that falters; where it can hear no more, it says so and ends."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from posttrain import alarm
from posttrain.alarm import Alarm, lost_connection


class Faltering:
    """A connection whose next `failures` looks fail."""

    def __init__(self, store: Any, failures: int) -> None:
        self.store, self.failures = store, failures

    def check(self, keys: list[str]) -> bool:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Connection reset by peer")
        return bool(self.store.check(keys))


class Mute:
    """A connection over which no answer comes, and no end of it either."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(30)
        return False


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A store as a launcher has it, times shortened; `ended` is set where a rank would be ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made: dict[str, Any] = {"ended": threading.Event(), "statuses": [], "alarms": []}
    made["server"] = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    times = (("POLL_S", 0.02), ("GRACE_S", 0.1), ("CONNECT_S", 0.5), ("BEAT_S", 0.1), ("SILENT_S", 1.5))
    for name, seconds in times:
        monkeypatch.setattr(alarm, name, seconds)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: None)

    def end(status: int) -> None:
        made["statuses"].append(status)
        made["ended"].set()

    monkeypatch.setattr(alarm.os, "_exit", end)
    yield made
    for each in made["alarms"]:
        each.stop()
    time.sleep(0.1)


@pytest.fixture
def listen(launch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Alarm]:
    """Of the same run on every rank."""

    def made(rank: int) -> Alarm:
        monkeypatch.setattr(alarm, "_runs", iter([0]))
        launch["alarms"].append(Alarm(rank, 2))
        return launch["alarms"][-1]

    return made


def test_a_look_that_fails_is_not_the_last(launch: dict[str, Any], listen: Callable[[int], Alarm]) -> None:
    waiting, failing = listen(1), listen(0)
    waiting.store = Faltering(waiting.store, 1)  # type: ignore[assignment]
    assert not launch["ended"].wait(0.5), "a network that falters once has ended the rank"
    assert not isinstance(waiting.store, Faltering), "it did not connect anew"
    assert failing.ring("no data") is None
    assert launch["ended"].wait(5), "it no longer listens"
    assert launch["statuses"] == [1]


def test_a_store_that_is_gone_is_told(
    launch: dict[str, Any],
    listen: Callable[[int], Alarm],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alarm, "SILENT_S", 60.0)
    listen(1)
    del launch["server"]
    assert launch["ended"].wait(10)
    said = capfd.readouterr().err
    assert "posttrain: error: rank 1 ends: the launch's store at 127.0.0.1:" in said
    assert " is gone (" in said


def test_after_the_run_nothing_is_heard(
    launch: dict[str, Any], listen: Callable[[int], Alarm], capfd: pytest.CaptureFixture[str]
) -> None:
    listen(1).stop()
    del launch["server"]
    assert not launch["ended"].wait(1.5)
    assert capfd.readouterr().err == ""


def test_a_store_that_does_not_answer_is_told(
    launch: dict[str, Any], listen: Callable[[int], Alarm], capfd: pytest.CaptureFixture[str]
) -> None:
    waiting = listen(1)
    assert not launch["ended"].wait(2), "it ended though the store answers"
    waiting.store = Mute()  # type: ignore[assignment]
    assert launch["ended"].wait(5)
    waiting.stopped.set()
    assert "posttrain: error: rank 1 ends: the launch's store at 127.0.0.1:" in (said := capfd.readouterr().err)
    assert "has not answered for 1.5 s: the machine of rank 0 is down, or the network to it" in said


def test_a_rank_that_falls_silent_is_told_by_rank_0(
    launch: dict[str, Any], listen: Callable[[int], Alarm], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = listen(0), listen(1)
    assert not launch["ended"].wait(2), "both are there"
    second.stopped.set()  # its threads end, as with its process
    assert launch["ended"].wait(5)
    said = capfd.readouterr().err
    assert f"posttrain: error: rank 1 on {socket.gethostname()} has said nothing for 1.5 s: its machine is down" in said
    assert first.store.get("first").decode().startswith("0 rank 1 on "), "the others do not hear of it"


def test_a_rank_whose_run_is_over_or_has_not_begun_may_be_silent(
    launch: dict[str, Any], listen: Callable[[int], Alarm], capfd: pytest.CaptureFixture[str]
) -> None:
    listen(0)
    assert not launch["ended"].wait(2), "rank 1 has not begun"
    second = listen(1)
    assert not launch["ended"].wait(0.5)
    second.stop()
    assert not launch["ended"].wait(2), "rank 1 is over"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError(
                "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:29344: Connection "
                "reset by peer. This is typically caused by a remote worker hanging or bugs in the application."
            ),
            "Read error [10.77.0.2]:29344: Connection reset by peer",
        ),
        (
            dist.DistBackendError(
                "NCCL error in: x.cpp:1\nncclRemoteError: A call failed possibly due to a network error"
            ),
            "NCCL error in: x.cpp:1 ncclRemoteError: A call failed possibly due to a network error",
        ),
        (RuntimeError("CUDA error: out of memory"), None),
        (OSError("Connection reset by peer"), None),  # a hub, a server
    ],
)
def test_what_a_lost_connection_is(error: Exception, told: str | None) -> None:
    assert lost_connection(error) == told
