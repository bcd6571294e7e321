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
    assert detect([{"prompt": "q", "completion": None}] * 3).format == "prompts"
    assert detect([{"text": "t", "prompt": "q", "messages": CHAT}]).format == "messages"
    assert detect([{"prompt": "q", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}]).spelling.name == "pairs"
    assert detect([{"instruction": "q", "input": "", "output": "a", "text": "qa"}]).spelling.name == "alpaca"


PROMPT = {"prompt": "q"}
ANSWERED, PAIR = {**PROMPT, "completion": "a"}, {**PROMPT, "chosen": "a", "rejected": "b"}
GROUP = {**PROMPT, "responses": ["a", "b"], "rewards": [1, 0]}
LACKING = [
    ([ANSWERED, PROMPT], 2, "completion", "prompts"),
    ([PROMPT, PROMPT, PROMPT, ANSWERED], 1, "completion", "prompts"),
    ([{**PROMPT, "completion": None}, ANSWERED], 1, "completion", "prompts"),
    ([PAIR, {**PROMPT, "chosen": "a"}], 2, "rejected", "prompts"),
    ([{**PROMPT, "rejected": "a"}, PAIR], 1, "chosen", "prompts"),
    ([PAIR, {"chosen": "q a", "rejected": "q b"}], 2, "prompt", None),
    ([GROUP, PROMPT], 2, "responses", "prompts"),
    ([GROUP, {**PROMPT, "responses": ["a", "b"]}], 2, "rewards", None),
    ([{"messages": CHAT[:1], "chosen": "a", "rejected": "b"}, {"messages": CHAT[:1]}], 2, "chosen", "messages"),
    ([{**ANSWERED, "reward": 1.0}, ANSWERED], 2, "reward", "prompt_completion"),
    ([ANSWERED, ANSWERED, {**ANSWERED, "label": True}], 1, "label", "prompt_completion"),
    ([{"instruction": "q", "output": "a"}, {"instruction": "q"}], 2, "output", None),
]


@pytest.mark.parametrize(("rows", "row", "column", "otherwise"), LACKING)
def test_a_row_that_lacks_what_another_has_is_named(rows, row, column, otherwise):
    """However few have it: the rows that lack it are not made a poorer format of, with the column left aside."""
    message = error_of(rows)
    assert message.startswith(f"f.jsonl, row {row}, column '{column}': ")
    has = ", ".join(rows[row - 1])
    assert f"missing (this row has: {has})" in message or "found null" in message
    assert (f"or data.format={otherwise} to leave" in message) == (otherwise is not None)
    if otherwise:
        assert detect(rows, format=otherwise).format == otherwise


def test_columns_that_may_be_absent_stay_so():
    some = {"system": "s", "margin": 0.5, "id": 7, "note": "n"}
    for row in (ANSWERED, PAIR, GROUP, {"messages": CHAT}, {"text": "t"}, {"instruction": "q", "output": "a"}):
        alone = detect([row]).spelling
        for rows in ([row, {**row, **some}], [{**row, **some}, row, row]):
            assert detect(rows).spelling == alone
    assert detect([{**ANSWERED, "label": "news"}, ANSWERED]).format == "prompt_completion"
    alpaca = {"instruction": "q", "output": "a"}
    assert detect([alpaca, {**alpaca, "input": "i"}]).spelling.name == "alpaca"


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
