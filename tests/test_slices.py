"""Scores of slices: the right examples in each, the interval of a part, and no finding that their number explains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_arguments

from posttrain import stats
from posttrain.config import resolve
from posttrain.errors import ConfigError
from posttrain.evaluate import Evaluation
from posttrain.examples import histogram, labels, read_described
from posttrain.records import read_records
from posttrain.slices import _natural, slice_scores
from posttrain.tools.evaluate import evaluate

Run = Callable[..., Any]


def rows(path: str, count: int) -> str:
    kinds = ("sum", "difference")
    lines = [
        {"prompt": f"{i}{'+-'[i % 2]}{i + 3}=", "completion": str(i), "kind": kinds[i % 2], "level": i % 3 == 0}
        for i in range(10, 10 + count)
    ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_each_slice_is_scored_as_if_it_were_alone(run: Run, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    options = (f"data.eval={rows('e.jsonl', 60)}", "eval.slices=[kind,length]", "run.dir=r", "eval.resamples=200")
    if verb == "train":
        summary = run(*options)
    else:
        summary = evaluate(resolve(small_arguments(*options, "data.train=", "train.steps="), "eval"))
    step = 4 if verb == "train" else 0
    ids, _, records = read_records(Path(f"r/eval/step-{step:06d}.parquet"))
    examples = read_described(Path("r/eval"))
    assert examples is not None
    kinds = dict(zip(examples.ids, (c["kind"] for c in examples.columns), strict=True))
    lengths = dict(zip(examples.ids, examples.tokens, strict=True))
    found = {(row["by"], row["value"]): row for row in summary.slices}
    assert set(found) == {("kind", "difference"), ("kind", "sum")} | {("length", str(n)) for n in set(lengths.values())}
    for (by, value), row in found.items():
        chosen = np.array([kinds[i] == value if by == "kind" else str(lengths[i]) == value for i in ids])
        assert row["examples"] == chosen.sum() > 0
        sums, tokens = records["nll_sum"][chosen], records["tokens"][chosen]
        assert row["end"]["value"] == pytest.approx(sums.sum() / tokens.sum())
        assert (row["change"] is None) == (verb == "eval")
    assert sum(row["examples"] for (by, _), row in found.items() if by == "kind") == 60
    told = capsys.readouterr().out
    assert "kind difference" in told
    assert json.loads(Path("r/summary.json").read_text())["slices"] == summary.slices
    if verb == "train":  # all of them are one family
        changes = [row["change"] for row in summary.slices if row["change"]["p_value"] is not None]
        corrected = stats.holm([change["p_value"] for change in changes]).tolist()
        assert [change["p_holm"] for change in changes] == pytest.approx(corrected)


def test_a_column_that_there_is_not(run: Run) -> None:
    with pytest.raises(
        ConfigError, match=r"'topic', which no evaluation example has; they have kind, level, and length"
    ):
        run(f"data.eval={rows('e.jsonl', 20)}", "eval.slices=[topic]", "run.dir=r")


def test_many_values_are_put_together() -> None:
    assert labels(["b", None, "a", True]) == ["b", "(none)", "a", "True"]
    many = [f"v{i}" for i in range(30)] + ["often"] * 5
    assert len(set(labels(many))) == 12
    assert labels(many)[-1] == "often"
    assert set(labels(many)) - set(many) == {"(20 others)"}
    numbers = labels([*range(1, 101), None])
    assert numbers[:2] + numbers[49:51] + numbers[-2:] == ["1-25", "1-25", "26-50", "51-75", "76-100", "(none)"]
    assert labels([1, 2, 2, 1]) == ["1", "2", "2", "1"]
    assert len(set(labels([0] * 90 + list(range(20))))) > 1  # three quarters of them are one number


@pytest.mark.parametrize(
    "numbers",
    [[1_700_000_000 + i for i in range(60)], [1 + i / 10**9 for i in range(40)], [-40 + i for i in range(40)]],
)
def test_quarters_are_told_apart(numbers: list[float]) -> None:
    found = labels(list(numbers))
    assert len(set(found)) == 4
    assert [found.count(name) for name in dict.fromkeys(found)] == [len(numbers) // 4] * 4
    assert sorted(set(found), key=_natural) == list(dict.fromkeys(found))


def test_what_is_no_number_to_order_by_is_a_text() -> None:
    assert len(set(labels([10**400, *range(30)]))) == 12
    assert "inf" in labels([float("inf"), float("inf"), *range(30)])
    assert "nan" in labels([float("nan"), float("nan"), *range(30)])


def test_a_column_called_length(run: Run) -> None:
    lines = [json.dumps({"prompt": f"{i}+1=", "completion": "2", "length": "a"}) + "\n" for i in range(20)]
    Path("e.jsonl").write_text("".join(lines))
    with pytest.raises(ConfigError, match="the data has a column of that name, too"):
        run("data.eval=e.jsonl", "eval.slices=[length]", "run.dir=r")


def test_without_an_interval_nothing_is_claimed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("data.eval_limit=1", "eval.slices=[length]", "run.dir=r")
    told = capsys.readouterr().out.split("slices (")[1]
    assert "no detectable change" not in told


def test_a_change_must_hold_up_among_all_slices() -> None:
    """One slice of twenty has p = .01: expected once in five such tables though nothing changed."""
    rng = np.random.default_rng(0)
    ids = [f"{i:03d}" for i in range(400)]
    start = rng.normal(1, 0.1, 400)
    end = start + rng.normal(0, 0.1, 400)
    of = {"part": {name: f"p{i // 20:02d}" for i, name in enumerate(ids)}}
    options = resolve(small_arguments("eval.resamples=500")).eval
    first, last = (
        Evaluation(step, {}, ids, ids, {"nll_sum": values, "tokens": np.ones(400)})
        for step, values in ((0, start), (9, end))
    )
    found = slice_scores(first, last, of, "nll", options, 0)
    assert len(found) == 20
    ps = [row["change"]["p_value"] for row in found]
    assert min(ps) < 0.1
    assert min(stats.holm(ps)) > 0.2


def test_histogram_of_lengths() -> None:
    found = histogram(np.array([3, 3, 4, 9]))
    assert sum(found["counts"]) == 4
    assert found["edges"][0] == 3
    assert found["edges"][-1] == 10
    assert histogram(np.array([5, 5])) == {"edges": [5.0, 6.0], "counts": [2]}
