"""Rows → Groups: every format and spelling, with the Group worked out by hand."""
# ruff: noqa: E501 (the tables read best with a row a line)

import pytest
from given import CHAT, SHARED, A, S, U, detect, error_of, one, read

from posttrain.data.formats import Report
from posttrain.data.group import Message

# (row, format, prompt, responses)
PLAIN = [
    ({"text": " a\n"}, "text", None, (" a\n",)),
    ({"prompt": "q", "completion": " a"}, "prompt_completion", "q", (" a",)),
    ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion", (S("s"), U("q")), ((A("a"),),)),
    ({"prompt": "q", "completion": "a", "system": " "}, "prompt_completion", "q", ("a",)),
    ({"prompt": SHARED, "completion": "a"}, "prompt_completion", (U("q"),), ((A("a"),),)),
    ({"prompt": "q", "completion": CHAT[1]}, "prompt_completion", (U("q"),), ((A("a"),),)),
    ({"instruction": "do", "input": "this", "output": "a"}, "prompt_completion", "do\nthis", ("a",)),
    ({"instruction": " do ", "input": "", "output": "a"}, "prompt_completion", "do", ("a",)),
    ({"instruction": "do", "output": "a"}, "prompt_completion", "do", ("a",)),
    ({"instruction": "", "input": "this", "output": "a"}, "prompt_completion", "this", ("a",)),
    ({"instruction": "do", "input": None, "output": "a", "system": "s"}, "prompt_completion", (S("s"), U("do")), ((A("a"),),)),
    ({"messages": CHAT}, "messages", (U("q"),), ((A("a"),),)),
    ({"messages": [{"system": "s"}, *CHAT, *CHAT]}, "messages", (S("s"), U("q"), A("a"), U("q")), ((A("a"),),)),
    ({"messages": '[{"user": "q"}, {"assistant": "a"}]'}, "messages", (U("q"),), ((A("a"),),)),  # a csv cell
    ({"conversations": [*SHARED, {"from": "gpt", "value": "a"}], "system": "s"}, "messages", (S("s"), U("q")), ((A("a"),),)),
    ({"prompt": "q"}, "prompts", "q", ()),
    ({"prompt": CHAT[:1]}, "prompts", (U("q"),), ()),
]  # fmt: skip

# (row, format, prompt, responses, rewards)
JUDGED = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs", "q", ("a", "b"), (1, 0)),
    ({"prompt": "q", "chosen": CHAT[1:], "rejected": {"from": "gpt", "value": "b"}}, "pairs", (U("q"),), ((A("a"),), (A("b"),)), (1, 0)),
    ({"prompt": "q", "chosen": CHAT, "rejected": [CHAT[0], {"assistant": "b"}]}, "pairs", (U("q"),), ((A("a"),), (A("b"),)), (1, 0)),
    ({"chosen": CHAT, "rejected": [CHAT[0], {"assistant": "b"}]}, "pairs", (U("q"),), ((A("a"),), (A("b"),)), (1, 0)),
    ({"chosen": CHAT, "rejected": CHAT}, "pairs", (U("q"),), ((A("a"),), (A("a"),)), (1, 0)),
    ({"chosen": "\n\nHuman: q\n\nAssistant: yes a", "rejected": "\n\nHuman: q\n\nAssistant: yes b"}, "pairs",
     "\n\nHuman: q\n\nAssistant:", (" yes a", " yes b"), (1, 0)),
    ({"chosen": "Q: 2*2? A: 4", "rejected": "Q: 2*2? A: 42"}, "pairs", "Q: 2*2? A:", (" 4", " 42"), (1, 0)),
    ({"conversations": SHARED, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, "pairs",
     (U("q"),), ((A("a"),), (A("b"),)), (1, 0)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": "a"}, "pairs", "q", ("a", "b"), (1, 0)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": "B"}, "pairs", "q", ("b", "a"), (1, 0)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": 0}, "pairs", "q", ("b", "a"), (1, 0)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": "1"}, "pairs", "q", ("a", "b"), (1, 0)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": 0.25}, "pairs", "q", ("b", "a"), (0.75, 0.25)),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "preference": "tie"}, "pairs", "q", ("a", "b"), (0.5, 0.5)),
    ({"prompt": "q", "completion": "a", "label": True}, "pairs", "q", ("a",), (1,)),
    ({"prompt": "q", "completion": "a", "label": "false"}, "pairs", "q", ("a",), (0,)),
    ({"messages": CHAT, "label": 0}, "pairs", (U("q"),), ((A("a"),),), (0,)),
    ({"prompt": "q", "responses": ["a", "b"], "rewards": [0.5, -1]}, "groups", "q", ("a", "b"), (0.5, -1)),
    ({"prompt": "q", "responses": ["a", CHAT[1:]], "rewards": "[1, 2]"}, "groups", (U("q"),), ((A("a"),), (A("a"),)), (1, 2)),
    ({"messages": CHAT[:1], "responses": ["a"], "rewards": [1]}, "groups", (U("q"),), ((A("a"),),), (1,)),
    ({"prompt": "q", "completion": "a", "reward": "0.5"}, "scored", "q", ("a",), (0.5,)),
    ({"messages": CHAT, "reward": 2}, "scored", (U("q"),), ((A("a"),),), (2,)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "format", "prompt", "responses"), PLAIN)
def test_plain_spellings(row, format, prompt, responses):
    group = one(row)
    assert (detect([row]).format, group.prompt, group.responses, group.rewards) == (format, prompt, responses, None)


@pytest.mark.parametrize(("row", "format", "prompt", "responses", "rewards"), JUDGED)
def test_judged_spellings(row, format, prompt, responses, rewards):
    group = one(row)
    assert (detect([row]).format, group.prompt, group.responses, group.rewards) == (format, prompt, responses, rewards)


def test_signals_beside_the_rewards():
    base = {"prompt": "q", "responses": ["a", "b", "c"]}
    group = one({**base, "ranks": [2, 1, 2], "sampler_logprobs": [-1, -2.5, -3]})
    assert (group.ranks, group.rewards, group.sampler_logprobs) == ((2, 1, 2), None, (-1, -2.5, -3))
    assert one({**base, "target_probs": [0.2, 0.3, 0.5]}).target_probs == (0.2, 0.3, 0.5)
    assert one({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}).margin == 0.5
    preference = {"prompt": "q", "response_a": "a", "response_b": "b"}
    assert one({**preference, "preference": 0.25}).target_probs == (0.75, 0.25)
    assert one({**preference, "preference": 1}).target_probs is None
    scored = one({"prompt": "q", "completion": "a", "reward": 1, "sampler_logprob": -4})
    assert scored.sampler_logprobs == (-4,)


def test_several_reward_columns_are_weighted_and_kept():
    weights = {"right": 1.0, "short": 0.5}
    group = one({"prompt": "q", "responses": ["a", "b"], "right": [1, 0], "short": [2, 4]}, reward_weights=weights)
    assert (group.rewards, group.columns) == ((2.0, 2.0), {"right": [1, 0], "short": [2, 4]})
    assert one({"prompt": "q", "completion": "a", "right": 1, "short": -2}, reward_weights=weights).rewards == (0.0,)
    rows = {"prompt": "q", "responses": ["a"], "right": [1]}
    assert "data.reward_weights names 'short', but the columns are prompt, responses, right" in error_of(
        rows, reward_weights=weights
    )
    assert "is for the formats groups and scored" in error_of(
        {"prompt": "q", "chosen": "a", "rejected": "b", "right": 1}, reward_weights={"right": 1}
    )


def test_scored_rows_of_equal_prompts_join():
    scored = [("q", "a", 1, "x"), ("p", "a", 2, "x"), ("q", "b", 3, "y")]
    rows = [{"prompt": p, "completion": c, "reward": r, "by": by, "n": 7} for p, c, r, by in scored]
    first, second = read(rows)
    assert (first.prompt, first.responses, first.rewards, first.row) == ("q", ("a", "b"), (1, 3), 1)
    assert first.columns == {"by": ["x", "y"], "n": 7}
    assert (second.prompt, second.responses, second.rewards, second.row) == ("p", ("a",), (2,), 2)
    chats = [
        {"messages": CHAT, "reward": 1, "sampler_logprob": -1},
        {"messages": CHAT, "reward": 0, "sampler_logprob": -2},
    ]
    (group,) = read(chats)
    assert (group.rewards, group.sampler_logprobs) == ((1, 0), (-1, -2))


def test_message_spellings_flags_parts_and_extras():
    call = {"id": "1", "function": {"name": "f"}}
    spoken = [
        {"role": "System", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"], "name": "Ann", "x": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "train": False},
        {"from": "observation", "value": ""},
        {"from": "developer", "value": "d"},
        {"role": "assistant", "content": "e", "weight": 1.0},
    ]
    group = one({"messages": spoken, "tools": [1]})
    assert group.prompt == (
        Message("system", ""),
        Message("user", "abc", extra={"name": "Ann"}),
        Message("assistant", "", train=False, extra={"tool_calls": [call]}),
        Message("tool", ""),
        Message("developer", "d"),
    )
    assert group.responses == ((Message("assistant", "e", train=True),),)
    assert group.columns == {"tools": [1]}


def test_turns_after_the_last_answer_are_cut_and_counted():
    report = Report()
    (group,) = read([{"messages": [*CHAT, {"role": "user", "content": "thanks"}]}], report=report)
    assert (group.prompt, group.responses) == ((U("q"),), ((A("a"),),))
    assert report.lines() == ["1 conversations that end after their last assistant turn: the turns after it were cut"]


def test_groups_of_the_same_content_have_one_id():
    assert (
        one({"prompt": "q", "completion": "a", "n": 1}).content_id()
        == one({"instruction": "q", "output": "a"}).content_id()
    )
