"""Which format a file's columns mean, what data.format and data.columns change, and what is said about it."""

import pytest
from given import CHAT, S, U, detect, error_of, one

from posttrain.data.formats import FORMATS, describe
from posttrain.errors import ConfigError


def test_detection_looks_at_the_whole_file_and_the_richest_format_of_most_rows_wins():
    rows = [{"prompt": "q", "completion": "a"}] * 3
    assert detect([{"prompt": "q"}, *rows]).format == "prompt_completion"
    assert (
        detect([*rows, {"prompt": "q", "completion": "a", "chosen": "c", "rejected": "r"}]).format
        == "prompt_completion"
    )
    assert detect([{"prompt": "q", "completion": None}] * 3 + rows[:1]).format == "prompts"
    assert detect([{"text": "t", "prompt": "q", "messages": CHAT}]).format == "messages"
    assert detect([{"prompt": "q", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}]).spelling.name == "pairs"
    assert detect([{"instruction": "q", "input": "", "output": "a", "text": "qa"}]).spelling.name == "alpaca"


def test_a_label_that_is_a_class_is_no_thumb():
    assert detect([{"prompt": "q", "completion": "a", "label": label} for label in (0, 3, 2, 1)]).format == "pairs"
    assert (
        detect([{"prompt": "q", "completion": "a", "label": label} for label in (0, 3, 2)]).format
        == "prompt_completion"
    )
    assert detect([{"prompt": "q", "completion": "a", "label": "news"}]).format == "prompt_completion"
    assert "row 2, column 'label': found int (3)" in error_of(
        [{"prompt": "q", "completion": "a", "label": label} for label in (0, 3, 1)]
    )


def test_data_format_overrides_and_lists_what_it_needs():
    row = {"messages": CHAT, "label": True}
    group = one(row, format="messages")
    assert (group.rewards, group.columns) == (None, {"label": True})
    assert one({"prompt": "q", "completion": "a"}, format="prompts").columns == {"completion": "a"}
    assert one({"messages": CHAT[:1]}, format="prompts").prompt == (U("q"),)
    assert one({"instruction": "do", "input": "it", "output": "a"}, format="prompts").prompt == "do\nit"
    message = error_of(row, format="pairs", mapping={"messages": "label"})
    assert (
        "f.jsonl: its columns do not fit data.format=pairs; found: messages, label; accepted: prompt, chosen" in message
    )
    with pytest.raises(ConfigError, match=r"data.format=pair: accepted: auto, .*did you mean pairs\?"):
        detect([row], format="pair")
    assert set(FORMATS) == {"text", "prompt_completion", "messages", "pairs", "groups", "scored", "prompts"}


def test_data_columns_merge_onto_the_defaults():
    group = one({"question": "q", "completion": "a", "system": "s"}, mapping={"prompt": "question", "completion": None})
    assert group.prompt == (S("s"), U("q"))
    moved = one(
        {"prompt": "kept", "question": "q", "answer": "a"}, mapping={"prompt": "question", "completion": "answer"}
    )
    assert (moved.prompt, moved.responses, moved.columns) == ("q", ("a",), {"prompt": "kept"})
    assert one({"text": "q", "completion": "a"}, mapping={"prompt": "text"}).prompt == "q"
    assert one({"dialog": CHAT}, mapping={"conversations": "dialog"}).prompt == (U("q"),)


def test_data_columns_that_do_not_exist():
    row = {"question": "q", "answer": "a"}
    message = error_of(row, mapping={"prompt": "questoin"})
    assert "f.jsonl: data.columns.prompt=questoin: no row has that column; found: question, answer" in message
    assert "did you mean data.columns.prompt=question?" in message
    assert "data.columns.promt: there is no such role; did you mean data.columns.prompt?" in error_of(
        row, mapping={"promt": "question"}
    )


def test_columns_that_fit_no_format_are_listed_with_a_way_out():
    message = error_of({"question": "q", "answer": "a"})
    assert "f.jsonl: its columns fit no format; found: question, answer; accepted: " in message
    assert message.endswith("try data.columns.prompt=question data.columns.completion=answer")
    assert "prompt, completion |" in message


def test_describe():
    rows = [{"instruction": "q", "input": "", "output": "a", "id": 1}] * 1200
    assert (
        describe(detect(rows)) == "alpaca: instruction, input, output → prompt_completion, 1,200 rows; kept beside: id"
    )
    mapped = detect([{"question": "q", "answer": "a"}], mapping={"prompt": "question", "completion": "answer"})
    assert (
        describe(mapped) == "prompt and completion: prompt ← question, completion ← answer → prompt_completion, 1 row"
    )
    weighed = detect([{"prompt": "q", "responses": ["a"], "right": [1]}], reward_weights={"right": 0.5})
    assert describe(weighed) == "groups: prompt, responses, right × 0.5 → groups, 1 row"
