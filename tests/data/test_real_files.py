"""The real files of ../shared/data, with the counts that its README gives."""

import os
from collections import Counter
from pathlib import Path

import pytest

from posttrain.data.columns import Survey
from posttrain.data.formats import describe, detect_format, to_groups
from posttrain.data.preferences import best_response
from posttrain.data.sources import read_all
from posttrain.data.split import split, with_occurrence
from posttrain.data.text import text_blocks

FOLDER = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}; POSTTRAIN_SHARED_DATA names another folder"),
]
GSM8K = {"prompt": "question", "completion": "answer"}


def load(name, **options):
    sources = [str(FOLDER / name)]
    detected = detect_format(Survey().add(row for _, _, row in read_all(sources)), source=name, **options)
    return describe(detected), list(to_groups(read_all(sources), detected))


def test_alpaca():
    said, groups = load("alpaca_en_demo.json")
    assert said == "alpaca: instruction, input, output → prompt_completion, 999 rows"
    ids = [group.content_id() for group in groups]
    assert len(ids) - len(set(ids)) == 14
    unique = with_occurrence(ids)
    assert len(set(unique)) == 999
    sides = {}
    for id, held in zip(ids, split(unique, 0.5, 0), strict=True):
        assert sides.setdefault(id, held) == held
    assert groups[0].prompt == "Describe a process of making crepes."
    assert groups[5].prompt == (
        "Given the parameters of a triangle, find out its perimeter.\nSide 1 = 4\nSide 2 = 6\nSide 3 = 8"
    )


def test_kto():
    said, groups = load("kto_en_demo.json")
    assert said == "labelled conversations (KTO): messages, label → pairs, 300 rows"
    assert Counter(group.rewards for group in groups) == {(1.0,): 150, (0.0,): 150}
    assert sum(best_response(group) is not None for group in groups) == 150
    assert len(load("kto_en_demo.json", format="messages")[1]) == 300


def test_dpo():
    said, groups = load("dpo_en_demo.json")
    assert said == "ShareGPT pairs: conversations, chosen, rejected → pairs, 300 rows"
    # 80 conversations open with a system turn, and every one ends with the user's
    assert Counter(group.prompt[0].role for group in groups) == {"user": 220, "system": 80}
    assert {group.prompt[-1].role for group in groups} == {"user"}
    assert all([turn.role for turn in r] == ["assistant"] for group in groups for r in group.responses)
    assert all(best_response(group) == group.responses[0] for group in groups)


@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train.jsonl", 3000), ("gsm8k_test.jsonl", 300)])
def test_gsm8k(name, rows):
    said, groups = load(name, mapping=GSM8K)
    assert said == f"prompt and completion: prompt ← question, completion ← answer → prompt_completion, {rows:,} rows"
    assert all("\n#### " in group.responses[0] for group in groups)
    assert "answer" in load(name, mapping={"prompt": "question"})[1][0].columns  # for a verifier, as format prompts


def test_gsm8k_groups_and_pairs():
    said, groups = load("gsm8k_groups.jsonl")
    assert said == "groups: prompt, responses, rewards → groups, 1,000 rows; kept beside: source"
    assert Counter(len(group.responses) for group in groups) == {4: 1000}
    assert sum(len(set(group.rewards)) == 1 for group in groups) == 439  # methods.md, gpro
    assert sum(best_response(group) is None for group in groups) == 315  # all wrong
    said, pairs = load("gsm8k_pairs.jsonl")
    assert said == "pairs: prompt, chosen, rejected → pairs, 561 rows"
    assert {group.rewards for group in pairs} == {(1.0, 0.0)}
    assert len(groups) - 439 == len(pairs)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2_valid.txt"])
def test_text_streams(name):
    blocks = list(text_blocks(str(FOLDER / name), block_chars=50_000))
    assert "".join(blocks).encode() == (FOLDER / name).read_bytes()
    assert len(blocks) > 15
