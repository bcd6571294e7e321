"""Every bad row is told with file, row, column, what was found and what is accepted; or skipped, counted and listed."""
# ruff: noqa: E501 (the table reads best with a row a line)

import pytest
from given import CHAT, SHARED, error_of, read

from posttrain.data.formats import Report
from posttrain.errors import DataError

GOOD = {
    "text": {"text": "t"},
    "completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "messages": {"messages": CHAT},
    "pair": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "turns": {"conversations": SHARED, "chosen": "a", "rejected": "b"},
    "inside": {"chosen": CHAT, "rejected": CHAT},
    "preference": {"prompt": "q", "response_a": "a", "response_b": "b", "preference": 1},
    "label": {"prompt": "q", "completion": "a", "label": True},
    "chat_label": {"messages": CHAT, "label": True},
    "group": {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 0]},
    "ranks": {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
    "probs": {"prompt": "q", "responses": ["a", "b"], "target_probs": [1, 0]},
    "scored": {"prompt": "q", "completion": "a", "reward": 1, "sampler_logprob": -1},
}
MISSING = object()
BAD = [
    ("text", {"text": " \n"}, "text", "found empty text (' \\n')"),
    ("text", {"text": 3}, "text", "found int (3)"),
    ("completion", {"completion": MISSING}, "completion", "missing (this row has: prompt)"),
    ("completion", {"completion": None}, "completion", "found null"),
    ("completion", {"completion": 3.5}, "completion", "found float (3.5)"),
    ("completion", {"completion": " "}, "completion", "found empty text (' ')"),
    ("completion", {"completion": [{"role": "user", "content": "x"}]}, "completion", "found the turns user"),
    ("completion", {"prompt": ""}, "prompt", "found empty text"),
    ("completion", {"prompt": CHAT}, "prompt", "ends with an assistant turn"),
    ("completion", {"system": 3}, "system", "found int (3)"),
    ("alpaca", {"instruction": " "}, "instruction", "found empty text"),
    ("alpaca", {"instruction": 3}, "instruction", "found int (3)"),
    ("alpaca", {"output": ""}, "output", "found empty text"),
    ("messages", {"messages": []}, "messages", "found an empty list"),
    ("messages", {"messages": "hello"}, "messages", "found str ('hello')"),
    ("messages", {"messages": "[1"}, "messages", "that is not JSON"),
    ("messages", {"messages": CHAT[:1]}, "messages", "no assistant turn, only user"),
    ("messages", {"messages": CHAT[1:]}, "messages", "nothing stands before the assistant's only turn"),
    ("messages", {"messages": ["x"]}, "messages", "message 1: found str ('x')"),
    ("messages", {"messages": [{"role": "user", "text": "x"}]}, "messages", "message 1 has no content"),
    ("messages", {"messages": [{"content": "x", "who": "y"}]}, "messages", "message 1 names no speaker: it has content, who"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "content": " ", "id": 3}]}, "messages", "message 2 (assistant) is empty"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "messages", "content of message 1: found int (3)"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "a part of message 1 holds no text"),
    ("messages", {"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "messages", "train or weight of message 2: found float (0.5)"),
    ("messages", {"messages": [{"system": "s"}, *CHAT], "system": "t"}, "messages", "two system messages (in the system column and"),
    ("messages", {"messages": [{"system": "s"}, {"system": "s"}, *CHAT]}, "messages", "two system messages (in the messages)"),
    ("pair", {"chosen": ""}, "chosen", "found empty text"),
    ("pair", {"rejected": 0}, "rejected", "found int (0)"),
    ("pair", {"rejected": MISSING}, "rejected", "missing (this row has: prompt, chosen)"),
    ("pair", {"margin": "big"}, "margin", "found str ('big')"),
    ("pair", {"chosen": CHAT, "rejected": CHAT, "prompt": "other"}, "prompt", "found str ('other')"),
    ("turns", {"conversations": CHAT}, "conversations", "the prompt ends with an assistant turn"),
    ("turns", {"chosen": []}, "chosen", "found an empty list of messages"),
    ("inside", {"chosen": "one", "rejected": "two"}, "chosen", "found no prompt that chosen and rejected both begin with"),
    ("inside", {"chosen": [{"user": "other"}, CHAT[1]]}, "chosen", "do not begin with the same prompt"),
    ("inside", {"chosen": "text"}, "chosen", "there is no prompt"),
    ("inside", {"rejected": [*CHAT, CHAT[0]]}, "rejected", "the conversation ends with a user turn"),
    ("preference", {"preference": 2}, "preference", "found int (2)"),
    ("preference", {"preference": "c"}, "preference", "found str ('c')"),
    ("label", {"label": "maybe"}, "label", "found str ('maybe')"),
    ("chat_label", {"messages": [*CHAT, CHAT[0]]}, "messages", "the conversation ends with a user turn"),
    ("group", {"rewards": [1]}, "rewards", "found 1 values for 2 responses"),
    ("group", {"rewards": [1, float("nan")]}, "rewards", "found float (nan)"),
    ("group", {"rewards": [1, "x"]}, "rewards", "found str ('x')"),
    ("group", {"rewards": MISSING}, "rewards", "missing (this row has: prompt, responses)"),
    ("group", {"responses": ["a", ""]}, "responses", "found empty text"),
    ("group", {"responses": []}, "responses", "found an empty list"),
    ("group", {"responses": "a"}, "responses", "found str ('a')"),
    ("group", {"sampler_logprobs": [1]}, "sampler_logprobs", "found 1 values for 2 responses"),
    ("ranks", {"ranks": [0, 1]}, "ranks", "found a rank of 0"),
    ("probs", {"target_probs": [0.5, 0.6]}, "target_probs", "whose sum is 1.1"),
    ("scored", {"reward": float("inf")}, "reward", "found float (inf)"),
    ("scored", {"sampler_logprob": MISSING}, "sampler_logprob", "missing"),
]  # fmt: skip


def changed(kind, change):
    return {name: value for name, value in {**GOOD[kind], **change}.items() if value is not MISSING}


@pytest.mark.parametrize(("kind", "change", "column", "found"), BAD)
def test_bad_row_is_told_with_file_row_and_column(kind, change, column, found):
    message = error_of([GOOD[kind]] * 2 + [changed(kind, change)])
    assert message.startswith(f"f.jsonl, row 3, column '{column}': ")
    assert found in message
    assert "; accepted: " in message
    assert "data.on_bad_row=skip" in message


def test_a_mapped_column_is_named_as_the_file_names_it():
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": ""}]
    assert "row 2, column 'answer'" in error_of(rows, mapping={"prompt": "question", "completion": "answer"})


def test_a_long_value_is_shown_by_its_beginning_only():
    assert len(error_of({"prompt": "q", "completion": "a", "system": ["x" * 9999]})) < 400


def test_skip_counts_and_lists():
    bad = {"prompt": "q", "completion": ""}
    report = Report(max_messages=2)
    groups = read([GOOD["completion"]] * 4 + [bad] * 3, on_bad_row="skip", report=report)
    assert len(groups) == 4
    assert (report.rows, report.groups, report.skipped) == (7, 4, 3)
    first, second, third, last = report.lines()
    assert first == "3 of 7 rows skipped (data.on_bad_row=skip):"
    assert second.startswith("  f.jsonl, row 5, column 'completion'")
    assert third.startswith("  f.jsonl, row 6, column 'completion'")
    assert last == "  and 1 more"
    with pytest.raises(DataError, match="all 2 rows were skipped as bad; the first: f"):
        read([bad, bad], on_bad_row="skip")


def test_a_text_stream_is_refused_where_rows_are_wanted():
    message = error_of({"text_stream": "a.txt"})
    assert message.startswith("a.txt: a .txt is one stream of text")
    assert "data.document_separator" in message
