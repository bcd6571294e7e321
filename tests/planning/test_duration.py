"""Times between the measured sizes, and of a whole run, by hand."""

import pytest

from posttrain.planning.calibrate import MicroSeconds, Seconds
from posttrain.planning.duration import Pace, clock, evaluations
from posttrain.planning.times import Times

MICRO = [
    MicroSeconds(100, Seconds(1.0), Seconds(2.0, 0.5), Seconds(4.0)),
    MicroSeconds(300, Seconds(3.0), Seconds(5.0), Seconds(8.0)),
]
PACE = Pace(MICRO, scoring=Seconds(2.0), update=Seconds(0.25), recomputes=False)


def test_a_step() -> None:
    """7 s at 100 tokens and 16 s at 300: 11.5 s halfway; beyond, in proportion: 32 s at 600, 3.5 s at 50."""
    assert PACE.step([100]).value == pytest.approx(7.25)
    assert PACE.step([200, 300]).value == pytest.approx(0.25 + 11.5 + 16)
    assert PACE.step([600]).value == pytest.approx(32.25)
    assert PACE.step([50]).value == pytest.approx(3.75)
    assert PACE.step([100, 100]).spread == pytest.approx(1.0)
    again = Pace(MICRO, Seconds(2.0), Seconds(0.25), recomputes=True)
    assert again.step([100]).value == pytest.approx(8.25)


def test_reading() -> None:
    """3 s of layers and 2 s outside for 300 tokens."""
    assert PACE.reading(600).value == pytest.approx(10.0)


def test_the_run() -> None:
    """10 steps of 2 s, 5 iterations' sampling of 3 s, 3 evaluations of 4 s, 7 s of reference."""
    times = Times(Seconds(2.0, 0.1), Seconds(3.0), Seconds(4.0), Seconds(7.0), 100, 10, 2, 3, [100])
    assert times.whole.value == pytest.approx(20 + 15 + 12 + 7)
    assert times.whole.spread == pytest.approx(1.0)


def test_how_often_it_evaluates() -> None:
    assert evaluations(10, None) == 6  # at 0, and every 2
    assert evaluations(10, 4) == 4  # 0, 4, 8, 10
    assert evaluations(3, 100) == 2


def test_clock() -> None:
    assert [clock(s) for s in (2.34, 59, 61, 3_599, 3_600, 90_061)] == [
        "2.3 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "1:00 h",
        "25:01 h",
    ]
