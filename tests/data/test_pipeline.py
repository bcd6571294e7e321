"""Sources to token files: found again only when nothing that decides the tokens has changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import resolve
from posttrain.data.pipeline import Prepared, prepare
from posttrain.errors import ConfigError, DataError
from posttrain.models.load import load_tokenizer

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(60)]


@pytest.fixture(autouse=True)
def _files() -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("a.jsonl", "b.jsonl", "same.txt", "folder/c.jsonl", "folder/d.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)


def prepared(*overrides: str) -> Prepared:
    cfg = resolve(["model.path=embedded", "data.max_length=64", "data.eval_fraction=0.2", *overrides], "plan")
    tokenizer: Any = load_tokenizer(cfg.model)
    return prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed)


def test_the_same_content_is_tokenised_once() -> None:
    first, second = prepared("data.train=a.jsonl"), prepared("data.train=a.jsonl")
    assert (first.reused, second.reused) == (False, True)
    assert first.lines == second.lines
    assert len(first.train) + len(first.eval) == 60
    assert not set(first.train.column("id")) & set(first.eval.column("id"))


def test_the_same_bytes_under_another_ending_are_read_anew() -> None:
    stream = prepared("stage=pretrain", "data.train=same.txt")
    rows = prepared("stage=pretrain", "data.train=a.jsonl")
    assert any("one stream of text" in line for line in stream.lines)
    assert any("60 rows" in line for line in rows.lines)


def test_a_limit_on_losses_holds_for_what_is_found_again() -> None:
    lossy = ["data.train=a.jsonl", "data.max_length=6"]
    assert len(prepared(*lossy, "data.max_lost_fraction=1").train) < 40
    with pytest.raises(DataError, match=r"data.max_lost_fraction=0.2 allows"):
        prepared(*lossy)


def test_what_is_told_of_a_side_is_that_sides() -> None:
    """Not what the evaluation data lose as well."""
    with pytest.raises(DataError, match=r"data\.train: (\d+) of 60 .* allows: \1 dropped: longer"):
        prepared("data.train=a.jsonl", "data.eval=a.jsonl", "data.max_length=6")


def test_a_mix_needs_a_weight_for_every_file() -> None:
    with pytest.raises(ConfigError, match=r"data.mix has 2 weights, but data.train stands for 3 files"):
        prepared("data.train=[folder,a.jsonl]", "data.mix=[0.5,0.5]")
    assert prepared("data.train=[folder,a.jsonl]", "data.mix=[0.5,0.2,0.3]").train


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json"])
def test_a_line_that_is_no_row_is_skipped_and_listed(name: str) -> None:
    lines = [json.dumps(row) for row in ROWS]
    if name == "bad.json":  # one document: its rows are whole JSON, but some are no objects
        Path(name).write_text(f"[{', '.join([*lines[:10], '[1, 2]', *lines[10:], '3'])}]")
        told = [f"{name}, row 11: found list ([1, 2])", f"{name}, row 62: found int (3)"]
    else:
        Path(name).write_text("\n".join([*lines[:10], '{"prompt": "1+', *lines[10:], "[1, 2]"]) + "\n")
        told = [f"{name}, line 11, column 1", f"{name}, line 62: found list ([1, 2])"]
    with pytest.raises(DataError, match=r"or set data\.on_bad_row=skip to skip and count such rows"):
        prepared(f"data.train={name}")
    found = prepared(f"data.train={name}", "data.on_bad_row=skip")
    assert len(found.train) + len(found.eval) == 60
    at = found.lines.index("2 of 62 rows skipped (data.on_bad_row=skip):")
    for line, words in zip(found.lines[at + 1 : at + 3], told, strict=True):
        assert line.strip().startswith(words), line
    with pytest.raises(DataError, match=r"2 of 62 examples \(3%\).*2 bad rows skipped"):
        prepared(f"data.train={name}", "data.on_bad_row=skip", "data.max_lost_fraction=0.03")


def test_a_file_of_nothing_but_broken_lines_says_so() -> None:
    Path("bad.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: none of its rows can be read; the first: bad\.jsonl, line 1"):
        prepared("data.train=bad.jsonl", "data.on_bad_row=skip")


def test_a_csv_row_of_too_many_cells_is_skipped() -> None:
    Path("bad.csv").write_text("prompt,completion\n" + "".join(f"{n}+1=,{n + 1}\n" for n in range(20)) + "a,b,c\n")
    found = prepared("data.train=bad.csv", "data.on_bad_row=skip")
    assert "1 of 21 rows skipped (data.on_bad_row=skip):" in found.lines
    assert len(found.train) + len(found.eval) == 20


def test_a_limit_is_shared_by_the_sources() -> None:
    found = prepared("data.train=[a.jsonl,b.jsonl]", "data.train_limit=9")
    assert sorted(found.train.column("source")) == [0] * 4 + [1] * 5
