"""Which response is best, which pairs a Group makes, and what is counted as odd. Expected values by hand."""

import pytest

from posttrain.data.group import Group
from posttrain.data.preferences import best_response, oddities, pairs_of


def group(responses="abcd", **signals):
    k = max((len(v) for v in signals.values() if isinstance(v, tuple)), default=len(responses))
    return Group("q", tuple(responses[:k]), **signals)


@pytest.mark.parametrize(
    ("signals", "best"),
    [
        ({"rewards": (1.0, 0.0)}, "a"),  # chosen
        ({"rewards": (0.5, 0.5), "target_probs": (0.5, 0.5)}, None),  # a tie
        ({"rewards": (0.75, 0.25), "target_probs": (0.75, 0.25)}, "a"),
        ({"rewards": (1.0,)}, "a"),  # label true
        ({"rewards": (0.0,)}, None),  # label false
        ({"rewards": (-2.0,)}, None),
        ({"rewards": (0.0, 0.0, 0.0, 0.0)}, None),  # all wrong
        ({"rewards": (0.0, 1.0, 1.0)}, "b"),
        ({"rewards": (1.0, 1.0)}, "a"),  # all right
        ({"rewards": (-3.0, -1.0)}, "b"),
        ({"ranks": (3.0, 1.0, 2.0)}, "b"),
        ({"ranks": (1.0,)}, "a"),
        ({"target_probs": (0.2, 0.5, 0.3)}, "b"),
    ],
)
def test_best_response(signals, best):
    assert best_response(group(**signals)) == best


def test_best_response_without_judgement_or_responses():
    assert best_response(Group("q", ("a",))) == "a"
    assert best_response(Group("q", ())) is None


def test_pairs_of_a_group():
    judged = group(rewards=(0.0, 2.0, 0.0, 3.0), sampler_logprobs=(-1.0, -2.0, -3.0, -4.0))

    def made(how, source=judged):
        return [("".join(pair.responses), pair.margin) for pair in pairs_of(source, how)]

    assert made("all") == [("ba", 2), ("da", 3), ("bc", 2), ("db", 1), ("dc", 3)]
    assert made("best_worst") == [("da", 3)]
    assert made("sample") == made("sample")
    assert made("sample")[0] in made("all")
    assert made("all", group(rewards=(1.0, 1.0))) == []
    assert made("all", group(ranks=(2.0, 1.0, 1.0))) == [("ba", None), ("ca", None)]
    first = next(pairs_of(judged))
    assert (first.rewards, first.sampler_logprobs, first.target_probs) == ((1, 0), (-2, -1), None)


def test_oddities_are_counted_by_name():
    groups = [
        group(rewards=(1.0,)),
        group("aa", rewards=(1.0, 0.0)),
        group(rewards=(1.0, 1.0, 1.0)),
        group(rewards=(1.0, 0.0)),
    ]
    assert oddities(groups) == {
        "prompts with one response": 1,
        "prompts whose responses are judged equal": 1,
        "prompts with the same response twice": 1,
        "pairs whose chosen and rejected are the same": 1,
    }
