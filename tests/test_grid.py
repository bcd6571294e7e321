"""A sweep's arguments: what Hydra's grammar reads as several values, and what stays as it was typed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.grid import expand, split
from posttrain.config.values import override_parser
from posttrain.errors import ConfigError

SWEEPS = {
    "optim.lr=1e-5,1e-6": ["1e-5", "1e-6"],  # as typed: Hydra's reader makes 1e-05 of it
    "model.revision=007,008": ["007", "008"],
    "data.train=[a.jsonl,b.jsonl],[c.jsonl]": ["[a.jsonl,b.jsonl]", "[c.jsonl]"],
    "model.config={a:1,b:2},{a:3}": ["{a:1,b:2}", "{a:3}"],
    "x='a,b', \"c,d\"": ["'a,b'", '"c,d"'],
    "x=['a]',b],c": ["['a]',b]", "c"],
    "data.train=~/a.jsonl, ~/ü #1.jsonl": ["~/a.jsonl", "~/ü #1.jsonl"],
    "x=don't,won't": ["don't", "won't"],
    r"x=a\,b,c": [r"a\,b", "c"],
    "stage.beta=choice(0.05,0.1)": ["0.05", "0.1"],
    "x=range(1,4)": ["1", "2", "3"],
    "x=range(5,0,-2)": ["5", "3", "1"],
    "x=range(0.1,0.5,0.1)": ["0.1", "0.2", "0.3", "0.4"],
    "x=sort(3,1,2)": ["1", "2", "3"],
    "stage=sft,dpo": ["sft", "dpo"],
    "x='',a": ["''", "a"],
}
PLAIN = ["data.train=[a,b]", "x='a,b'", "x=(1)", "x=f(2)", "x=[", "x=don't", "model.config={a:1,b:2}", "x=choice(a)"]
REFUSED = {
    "x=1": "no key has several values",
    "x=1,": "a value is missing",
    "x=choice()": "a value is missing",
    "x=1,2,1": "1 is there twice",
    "x=[1,2": "does not close",
    "x=shuffle(1,2)": "has no order",
    "x=interval(0,1)": "has no order",
    "x=glob(*)": "has no order",
    "x=range(1,2,0)": "step must not be 0",
    "x=range(2,1)": "is empty",
    "x=range(a)": "lists are written a,b,c",
}


@pytest.mark.parametrize("argument", SWEEPS)
def test_values(argument: str) -> None:
    key = argument.partition("=")[0]
    assert [point.overrides for point in expand([argument])] == [(f"{key}={value}",) for value in SWEEPS[argument]]


@pytest.mark.parametrize("argument", PLAIN)
def test_one_value(argument: str) -> None:
    points = expand([argument, "y=1,2"])
    assert [point.arguments for point in points] == [
        (argument.replace("choice(a)", "a"), "y=1"),
        (argument.replace("choice(a)", "a"), "y=2"),
    ]


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_no_sweep(argument: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[argument]):
        expand([argument])


def test_the_last_key_varies_fastest_and_all_stay_in_their_places() -> None:
    points = expand(["stage=dpo", "a=1,2", "--config-dir", "x,y", "recipe=p,q", "b=3"])
    assert [point.overrides for point in points] == [
        ("a=1", "recipe=p"), ("a=1", "recipe=q"), ("a=2", "recipe=p"), ("a=2", "recipe=q"),
    ]  # fmt: skip
    assert points[1].arguments == ("stage=dpo", "a=1", "--config-dir", "x,y", "recipe=q", "b=3")
    with pytest.raises(ConfigError, match="a is given twice"):
        expand(["a=1,2", "+a=3"])


WORDS = st.text("abc.-_/", min_size=1, max_size=4) | st.integers(0, 99).map(str)
QUOTED = st.text("a,[]{} ", max_size=5).map(lambda text: f"'{text}'")
VALUES = st.recursive(
    WORDS | QUOTED, lambda inner: st.lists(inner, max_size=3).map(lambda v: f"[{','.join(v)}]"), max_leaves=4
)


@settings(max_examples=50, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=4))
def test_lists_are_cut_where_hydra_cuts_them(values: list[str]) -> None:
    """Hydra's own reader, on what it can read."""
    text = ",".join(values)
    swept = override_parser().parse_override(f"key={text}")
    assert swept.is_sweep_override()
    pieces = split(text)
    assert pieces is not None
    one_by_one = [override_parser().parse_override(f"key={piece}").get_value_element_as_str() for piece in pieces]
    assert one_by_one == list(swept.sweep_string_iterator())
