"""Rewards: verifiers, and a user's own function, which may do anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.rewards import Function, open_reward
from posttrain.verify import VERIFIERS

ROWS = [{"answer": "12"}, {"answer": "7"}, {"answer": "-3"}]
ASKED = ["5+7=", "3+4=", "1-4="]

MODULE = """
import os, time

def length(prompts, responses, rows):
    return [len(r) + len(rows[i]["answer"]) for i, r in enumerate(responses)]

def array(prompts, responses, rows):
    import numpy
    return numpy.arange(len(prompts))

def raises(prompts, responses, rows):
    raise KeyError("no such thing")

def short(prompts, responses, rows):
    return [1.0]

def text(prompts, responses, rows):
    return ["good" for _ in prompts]

def number(prompts, responses, rows):
    return 1.0

def nan(prompts, responses, rows):
    return [float("nan"), 1.0, None]

def hangs(prompts, responses, rows):
    time.sleep(600)

def dies(prompts, responses, rows):
    os._exit(3)

def unsendable(prompts, responses, rows):
    return lambda: 1

def process(prompts, responses, rows):
    return [os.getpid()] * len(prompts)

value = 3
"""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`mine`: a module of reward functions in the working directory."""
    import sys

    Path("my_rewards.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("my_rewards", None)


def test_verifiers() -> None:
    exact = open_reward("exact", 1)(ASKED, ["12", "8", ""], ROWS)
    assert (exact.scores, exact.unreadable) == ([1, 0, 0], 1)
    number = open_reward("number", 1)(ASKED, ["it is 12.0", "I do not know", "#### -3"], ROWS)
    assert (number.scores, number.unreadable) == ([1, 0, 1], 1)


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        (r"the answer is $\frac{1}{2}$", "0.5", True),
        (r"thus $x=\sqrt{8}$", r"2\sqrt{2}", True),
        ("it is 1/2", r"$\frac{1}{2}$", True),
        (r"$\boxed{12}$", r"\boxed{13}", False),
        ("I do not know", "2", None),
    ],
)
def test_mathematics(answer: str, reference: str, verdict: bool | None) -> None:
    assert VERIFIERS["math"](answer, reference) is verdict


def test_a_verifier_whose_library_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[math\]'"):
        open_reward("math", 1.0)


def test_an_unreadable_answer_is_wrong_and_counted_apart() -> None:
    with pytest.raises(DataError, match=r"no such column \(it has question\).*data\.columns\.answer"):
        open_reward("exact", 1)(["a"], ["b"], [{"question": "c"}])


def test_form_and_length() -> None:
    form = open_reward(r"regex:<think>.*</think>\s*\d+", 1)
    assert form(["", ""], ["<think>a\nb</think> 12 ", "12"], [{}, {}]).scores == [1, 0]
    assert open_reward("length:4", 1)(["", "", ""], ["abc", "abcdef", "a" * 90], [{}] * 3).scores == [0, -0.5, -1]


@pytest.mark.parametrize("spec", ["exactly", "regex:", "regex:(", "length:0", "length:x", "a b:c", "model:x:y"])
def test_what_is_no_reward_is_told(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"stage\.rewards"):
        open_reward(spec, 1)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("spec", ["my_rewards:none", "my_rewards:value", "no_such_module:f"])
def test_what_cannot_be_imported_is_told_before_anything_is_sampled(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec):
        open_reward(spec, 1)


@pytest.mark.usefixtures("mine")
def test_a_function_of_lists() -> None:
    reward = open_reward("my_rewards:length", 30)
    assert reward(ASKED, ["1", "22", ""], ROWS).scores == [3, 3, 2]
    assert open_reward("my_rewards:array", 30)(ASKED, [""] * 3, ROWS).scores == [0, 1, 2]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "raised KeyError: 'no such thing'"),
        ("short", "returned 1 values for 3 responses"),
        ("text", "returned 'good', a str, not a number"),
        ("number", "returned a float for 3 responses"),
        ("unsendable", "cannot be sent"),
        ("dies", r"died \(exit code 3\)"),
    ],
)
def test_a_failure_is_told_and_scores_nothing(name: str, told: str) -> None:
    import re

    found = open_reward(f"my_rewards:{name}", 30)(ASKED, [""] * 3, ROWS)
    assert all(math.isnan(score) for score in found.scores)
    assert found.failure
    assert re.search(told, found.failure)


@pytest.mark.usefixtures("mine")
def test_single_values_may_fail() -> None:
    found = open_reward("my_rewards:nan", 30)(ASKED, [""] * 3, ROWS)
    assert found.scores[1] == 1
    assert [math.isnan(score) for score in found.scores] == [True, False, True]
    assert found.failure == "my_rewards:nan returned 1 values that are not finite"


@pytest.mark.usefixtures("mine")
def test_a_function_that_hangs_is_stopped_and_asked_again() -> None:
    reward: Any = open_reward("my_rewards:hangs", 1.0)
    assert isinstance(reward, Function)
    began = time.monotonic()
    for _ in range(2):
        found = reward(ASKED, [""] * 3, ROWS)
        assert found.failure == "my_rewards:hangs took longer than stage.reward_seconds=1 and was stopped"
    assert time.monotonic() - began < 60
    assert reward.worker is None


@pytest.mark.usefixtures("mine")
def test_one_worker_serves_all_calls() -> None:
    reward = open_reward("my_rewards:process", 30)
    first, second = (reward(ASKED, [""] * 3, ROWS).scores for _ in range(2))
    assert first == second
