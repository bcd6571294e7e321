"""A page in every state that a run can be in, what it warns of, and the numbers that its drawings are made of."""

import fcntl
import json
import re
import sys
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.report import verdicts
from posttrain.report.cautions import cautions
from posttrain.report.charts import of_run
from posttrain.report.figures import calibration, examples
from posttrain.report.figures.svg import Easel
from posttrain.report.page import write_report
from posttrain.report.recorded import read_run
from posttrain.report.untrusted import excerpt, one_line, visible
from posttrain.stages.base import find, names
from posttrain.stats import fine_bins

NOON = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def estimate(value, low=None, high=None, clusters=40, method="percentile bootstrap"):
    return {"value": value, "low": low, "high": high, "se": 0.1, "n": 80, "clusters": clusters, "method": method}


def change(value, low, high, **more):
    return {"value": value, "low": low, "high": high, "better": None, "sentence": "a sentence", **more}


def a_run(path=Path("r"), stage="sft", verb="train", metrics=(), **files):
    """A run's directory by hand. metrics: (step, split, metrics); files: name → its JSON."""
    path.mkdir()
    config = {
        "stage": {"name": stage},
        "model": {"path": "embedded"},
        "train": {"steps": 10},
        "eval": {"confidence_level": 0.9},
    }
    (path / "config.json").write_text(json.dumps({**config, "verb": verb}), encoding="utf-8")
    lines = [
        json.dumps({"step": step, "split": split, "time_s": 1.0, "metrics": found}) for step, split, found in metrics
    ]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name, found in files.items():
        (path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return path


def records(path, step, **columns):
    """eval/step-….parquet with these columns."""
    (path / "eval").mkdir(exist_ok=True)
    size = len(next(iter(columns.values())))
    ids = [f"{i:02d}" for i in range(size)]
    table = {
        "id": ids,
        "cluster": ids,
        **{name: list(map(list, c)) if np.ndim(c) > 1 else c for name, c in columns.items()},
    }
    pq.write_table(pa.table(table), path / "eval" / f"step-{step:06d}.parquet")


def page(path, **options):
    return write_report(path, **options).read_text(encoding="utf-8")


EVALUATED = (0, "eval", {"nll": estimate(0.5, 0.4, 0.6), "accuracy": estimate(0.25, 0.2, 0.3)})
TRAINED = (3, "train", {"loss": 0.7, "lr": 1e-3, "grad_norm": 2.0})


def test_before_anything_is_known():
    html = page(a_run(metrics=[]))
    assert "Not finished: stopped at step 0 of 10" in html
    assert "No score has been recorded yet" in html
    assert "<figure" not in html


def test_a_running_job_can_be_watched():
    path = a_run(metrics=[EVALUATED, TRAINED])
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        html = page(path, now=NOON)
    assert "Running: step 3 of 10, written at 2026-11-21 12:00:00 UTC." in html
    assert "step 0" in html
    assert "verdict" not in html.partition('<section id="results">')[2].partition("</section>")[0]
    latest = (5, "eval", {"nll": estimate(0.3, 0.2, 0.4)})
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": latest[0], "split": "eval", "metrics": latest[2]}) + "\n" + '{"step": 6, "split"'
        )
    html = page(path)
    assert "stopped at step 5 of 10; the same command goes on" in html
    assert "0.300" in html
    assert ">latest<" in html
    assert "cannot be read" not in html, "a line that is being written is no damage"


def test_an_evaluation_alone_has_no_change():
    html = page(a_run(verb="eval", metrics=[EVALUATED], summary={"stage": "sft", "steps": 0, "metrics": EVALUATED[2]}))
    assert "Nothing was trained" in html
    assert ">value<" in html
    assert ">change<" not in html


def test_a_run_without_evaluation_data():
    html = page(a_run(metrics=[TRAINED], summary={"stage": "sft", "steps": 10, "tokens": 5, "seconds": 2.0}))
    assert "No evaluation has been recorded" in html
    assert "10 steps, 5 tokens in 2 s." in html
    assert "training loss" in html


def test_the_verdicts_and_the_smallest_change_that_would_have_shown():
    start, end = ({"nll": estimate(v, v - 0.1, v + 0.1), "accuracy": estimate(0.5, 0.4, 0.6)} for v in (0.9, 0.5))
    changes = {
        "nll": change(-0.4, -0.5, -0.3, better=True, wins=3, ties=1, losses=0),
        "accuracy": change(0.0, -0.1, 0.1, detectable=0.142),
    }
    summary = {"stage": "sft", "steps": 10, "start": start, "metrics": end, "changes": changes, "best_checkpoint": "c"}
    html = page(a_run(metrics=[(0, "eval", start), (10, "eval", end)], summary=summary))
    assert "90% intervals" in html
    for words in ("−0.400", "[−0.500, −0.300]", "▲</span> better", "3 / 1 / 0", "a change of 0.142 would have shown"):
        assert words in html, words


def test_what_is_damaged_is_told_and_the_rest_shown():
    path = a_run(metrics=[EVALUATED, TRAINED])
    (path / "summary.json").write_text("{", encoding="utf-8")
    (path / "samples.jsonl").write_text('{"before": {"answer": "fine"}, "id": "1"}\nnot json\n[1]\n', encoding="utf-8")
    (path / "eval").mkdir()
    (path / "eval" / "step-000000.parquet").write_bytes(b"PAR1")
    html = page(path)
    for words in (
        "summary.json cannot be read",
        "2 of samples.jsonl",
        "step-000000.parquet cannot be read",
        "fine",
        "training loss",
    ):
        assert words in html, words


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"metrics": [(0, "eval", {"nll": estimate(0.5, 0.4, 0.6, clusters=29)})]}, "Only 29 evaluation examples"),
        (
            {"metrics": [(0, "eval", {"temperature": estimate(4.0, method="T = 4 is a bound, no interval")})]},
            "The best temperature lies at or beyond a bound",
        ),
        ({"metrics": [(0, "eval", {"ece": estimate(None, method="no items")})]}, "ece could not be formed: no items"),
        ({"metrics": [(0, "eval", {"accuracy": estimate(1.0, 0.9, 1.0)})]}, "accuracy is 1: every example is right"),
        (
            {"summary": {"steps": 4, "stopped_early": True, "changes": {}}},
            "Stopped early at step 4: no better for train.patience",
        ),
        (
            {"summary": {"steps": 4, "best_checkpoint": "c", "changes": {"nll": change(0, -1, 1, wins=1, ties=3, losses=1)}}},
            "Many ties: 3 of 5",
        ),
        ({"summary": {"steps": 4, "changes": {"nll": change(1, 0.5, 2)}}}, "there is no best checkpoint"),
        ({"metrics": [(4, "train", {"truncated": 0.5})]}, "50% of the answers sampled last were cut"),
        ({"data": {"counts": {"groups": 100, "too_long": 3, "unrenderable": 1}}}, "4 of 100 examples read were dropped"),
        ({"data": {"counts": {"groups": 100, "truncated": 7}}}, "7 examples were cut"),
    ],
)  # fmt: skip
def test_warnings(made, said):
    told = cautions(read_run(a_run(**made)))
    assert any(said in line for line in told), told
    html = page(Path("r"))
    assert said in html


def test_no_warning_without_a_reason():
    start, end = EVALUATED[2], {"nll": estimate(0.4, 0.3, 0.5), "accuracy": estimate(0.5, 0.4, 0.6)}
    changes = {"nll": change(-0.1, -0.2, -0.05, wins=30, ties=4, losses=6)}
    summary = {
        "steps": 10,
        "start": start,
        "metrics": end,
        "changes": changes,
        "best_checkpoint": "c",
        "stopped_early": False,
    }
    made = a_run(
        metrics=[EVALUATED, TRAINED, (10, "eval", end)], summary=summary, data={"counts": {"groups": 9, "too_long": 0}}
    )
    assert cautions(read_run(made)) == []
    assert "Warnings" not in page(made)


def test_answers_cut_by_the_length_limit_are_told():
    path = a_run(metrics=[EVALUATED])
    answer = {"answer": "a", "finished": False, "verified": True, "verdict": False}
    lines = [{"id": str(i), "prompt": "p", "before": answer | {"finished": i > 1}, "after": None} for i in range(5)]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "2 of 5 generated answers were cut at eval.max_new_tokens before they had ended." in cautions(read_run(path))


def test_a_single_point_is_drawn():
    found = of_run(read_run(a_run(metrics=[EVALUATED, TRAINED])), Easel())
    assert [each.title for each in found["loss"] + found["scores"]] == ["training loss", "accuracy", "nll"]
    point = r"<use [^>]*fill: var\(--now\); stroke: var\(--now\)"
    assert all(re.search(point, each.svg) for each in found["loss"] + found["scores"])
    assert "0.500 [0.400, 0.600] at step 0, the only one so far" in found["scores"][1].says


def test_reliability_has_wilsons_bars_and_a_panel_at_the_fitted_temperature():
    path = a_run(metrics=[EVALUATED])
    # 8 examples of one token each, sure to 0.7, six of them right: Wilson at 95 % is [0.4093, 0.9285] (statsmodels)
    one = np.eye(4)[[2] * 8]
    right = one * np.array([1, 1, 1, 1, 1, 1, 0, 0])[:, None]
    half = one * (np.arange(8) < 4)[:, None]
    at_t = {
        "calibrated_bin_count": half,
        "calibrated_bin_confidence": 0.6 * half,
        "calibrated_bin_correct": right * half,
    }
    records(path, 0, tokens=np.ones(8), bin_count=one, bin_confidence=0.7 * one, bin_correct=right, **at_t)
    start, _ = read_run(path).records
    (bar,) = calibration.bars(start, 0.95)
    assert (bar.items, bar.confidence, bar.accuracy.value) == (8, pytest.approx(0.7), 0.75)
    assert (bar.accuracy.low, bar.accuracy.high) == (pytest.approx(0.4093, abs=1e-3), pytest.approx(0.9285, abs=1e-3))
    fine = fine_bins([0.7] * 8, [1] * 6 + [0] * 2, range(8), 8, 4)
    records(path, 0, tokens=np.ones(8), **fine, **at_t)
    (same,) = calibration.bars(read_run(path).records[0], 0.95)
    assert same == bar
    (fitted,) = calibration.bars(start, 0.95, "calibrated_")
    assert (fitted.items, fitted.accuracy.value) == (4, 1.0)
    titles = [each.title for each in of_run(read_run(path), Easel())["calibration"]]
    assert titles == [
        "reliability at step 0",
        "reliability at the fitted temperature, on the examples it was not fitted to",
    ]


def test_pairs_are_folded():
    path = a_run(stage="dpo", metrics=[EVALUATED])
    one = np.ones((3, 1))
    pairs = {"pair_accuracy_sum": np.ones(3), "pair_accuracy_count": np.ones(3)}
    records(path, 0, **pairs, bin_count=one, bin_confidence=0.8 * one, bin_correct=one)
    (bar,) = calibration.bars(read_run(path).records[0], 0.95)
    assert (bar.low, bar.high) == (0.5, 1.0)


def test_changes_are_of_the_same_examples():
    path = a_run(metrics=[EVALUATED])
    tokens = np.array([2.0, 2.0, 0.0, 4.0])
    records(path, 0, nll_sum=np.array([2.0, 4.0, 0.0, 4.0]), tokens=tokens)
    records(path, 10, nll_sum=np.array([1.0, 5.0, 0.0, 4.0]), tokens=tokens)
    found = examples.changes_of("nll", *read_run(path).records)
    assert found.tolist() == [-0.5, 0.5, 0.0]
    assert examples.changes_of("kl", *read_run(path).records) is None
    drawing = examples.changes(Easel(), "nll", found, lower=True)
    assert drawing.says.startswith("1 better, 1 worse, 1 the same, of 3 examples")


def test_lengths_say_what_was_cut():
    lengths = {"train": {"edges": [0.0, 10.0, 20.0], "counts": [3, 4]}, "eval": {"edges": [5.0, 6.0], "counts": [2]}}
    counts = {"groups": 12, "too_long": 3, "truncated": 2, "cut_tokens": 1_234}
    data = {"lines": ["a.jsonl: 12 rows"], "facts": [["data", "7 training, 2 evaluation examples"]], "counts": counts}
    html = page(a_run(metrics=[EVALUATED], data=data | {"lengths": lengths, "max_length": 64}))
    for words in (
        "a.jsonl: 12 rows",
        "3 of 12 examples were dropped as too long, 2 cut (1,234 tokens)",
        "data.max_length 64",
        "sft of embedded on 7 tr",
    ):
        assert words in html, words
    assert "7 examples, between 0 and 20 tokens" in html


def test_slices_and_their_corrected_p():
    part = {
        "by": "topic",
        "value": "sums",
        "examples": 20,
        "metric": "accuracy",
        "start": estimate(0.5, 0.4, 0.6),
        "end": None,
    }
    seen = change(0.2, 0.1, 0.3, p_value=0.001, p_holm=0.0123) | {"better": True}
    found = [
        part | {"change": seen},
        part | {"value": "rest", "change": seen | {"p_holm": 0.051}},
        part | {"change": None},
    ]
    html = page(a_run(metrics=[EVALUATED], summary={"steps": 10, "slices": found}))
    for words in ("accuracy by topic", "sums", "+0.200", "0.012"):
        assert words in html, words
    assert html.count("</span> better") == 1
    assert html.count("</span> no detectable change") == 1, "a change that does not hold up among as many slices"


def test_what_stages_watch_is_known_without_loading_them():
    for name in names():
        stage = find(name)
        assert verdicts.watched(name) == stage.watches, name
        assert verdicts.UNDECIDED.get(name, ()) == stage.undecided, name


def test_nothing_that_hides_or_reorders_is_left():
    kept = {"\n", "\t", "\u200c", "\u200d"}  # joiners: words of Persian and emoji need them
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        hides = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or code & 0xFFFE == 0xFFFE
        prepends = (
            unicodedata.category(character) == "Cf" and "ARABIC" in unicodedata.name(character, "") and code != 0x61C
        )
        prepends |= unicodedata.name(character, "") in (
            "SYRIAC ABBREVIATION MARK",
            "KAITHI NUMBER SIGN",
            "KAITHI NUMBER SIGN ABOVE",
        )
        if hides and not prepends and character not in kept:
            shown = visible(character)
            assert shown.isprintable(), hex(code)
            assert character not in shown, hex(code)
    assert visible("tab\t line\n naïve 字 مرحبا 👩\u200d💻") == "tab\t line\n naïve 字 مرحبا 👩\u200d💻"
    assert visible("\x00\x7f\u202e\U000e0041") == "⟨U+0000⟩⟨U+007F⟩⟨U+202E⟩⟨U+E0041⟩"


def test_a_long_text_keeps_its_ends_and_says_what_is_missing():
    text = "a" * 50_000 + "z" * 50_000
    cut = excerpt(text)
    assert (cut.head, cut.omitted, cut.tail) == ("a" * 3_000, 96_000, "z" * 1_000)
    assert "96,000 characters not shown" in one_line(text)
    assert excerpt("short").omitted == 0
