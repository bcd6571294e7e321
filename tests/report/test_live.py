"""When report.html is written: now and then, at the end, and never at the cost of the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.report import live
from posttrain.report.live import LivePage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that moves when told; each page takes 2 s. written: when pages were begun."""
    found = SimpleNamespace(now=100.0, written=[], fails=False)

    def write_report(path: Path) -> None:
        found.written.append(found.now)
        found.now += 2.0
        if found.fails:
            raise KeyError("odd")

    monkeypatch.setattr(live.time, "monotonic", lambda: found.now)
    monkeypatch.setattr("posttrain.report.page.write_report", write_report)
    return found


def test_a_page_takes_a_fiftieth_of_the_time(clock: Any) -> None:
    page = LivePage(SimpleNamespace(path=Path("r")), True, print)  # type: ignore[arg-type]
    for _ in range(1000):
        clock.now += 1.0
        page.write()
    assert clock.written[0] == 130.0
    assert all(later - earlier >= 2.0 / 0.02 for earlier, later in zip(clock.written, clock.written[1:], strict=False))
    assert 8 <= len(clock.written) <= 10
    page.write(at_end=True)
    assert clock.written[-1] == clock.now - 2.0


def test_what_keeps_it_from_being_written_is_told_once_and_ends_nothing(clock: Any) -> None:
    told: list[str] = []
    clock.fails = True
    page = LivePage(SimpleNamespace(path=Path("r")), True, told.append)  # type: ignore[arg-type]
    page.write(at_end=True)
    page.write(at_end=True)
    assert told == ["warning: report.html could not be written (KeyError: 'odd'); posttrain report r"]


def test_it_can_be_left_out(clock: Any) -> None:
    LivePage(SimpleNamespace(path=Path("r")), False, print).write(at_end=True)  # type: ignore[arg-type]
    assert not clock.written
