"""The embedded dataset and tokenizer, against sums worked by hand."""

import json
import re

import pytest

from posttrain.data.embedded import CARELESS_SHARE, Problem, rows
from posttrain.errors import DataError
from posttrain.models.embedded import CHARACTERS, DIRECTORY, build_tokenizer

KINDS = ("text", "prompt_completion", "pairs", "groups", "prompts")
DISTINCT = KINDS[1:]
TRAINING, HELD_OUT = 14_580, 1_620  # 2 operations x 90 x 90 problems, nine tenths and one tenth


def evaluate(text: str) -> int:
    """The right value of "a+b=" or "a-b=", by Python and not by the code under test."""
    assert re.fullmatch(r"[1-9]\d[+-][1-9]\d=", text)
    return int(eval(text[:-1]))


@pytest.mark.parametrize(
    ("a", "operation", "b", "careful", "careless"),
    [
        (47, "+", 38, 85, 75),  # 7+8=15: writes 5, forgets the 1
        (58, "+", 27, 85, 75),
        (99, "+", 99, 198, 188),  # the hundred stands: only the carry from the ones is forgotten
        (60, "+", 50, 110, 110),  # no carry from the ones
        (12, "+", 34, 46, 46),
        (55, "+", 45, 100, 90),
        (23, "-", 58, -35, 35),
        (10, "-", 99, -89, 89),
        (58, "-", 23, 35, 35),  # a borrow is no carry: differences only lose their sign
        (52, "-", 38, 14, 14),
        (40, "-", 40, 0, 0),
    ],
)
def test_the_two_authors(a: int, operation: str, b: int, careful: int, careless: int) -> None:
    problem = Problem(a, operation, b)
    assert problem.prompt == f"{a}{operation}{b}="
    assert (problem.careful(), problem.careless()) == (careful, careless)


@pytest.mark.parametrize("kind", KINDS)
def test_pure_and_only_appending(kind: str) -> None:
    first = rows(kind, 300, seed=3)
    assert rows(kind, 300, seed=3) == first
    assert rows(kind, 100, seed=3) == first[:100]
    assert rows(kind, 300, seed=4) != first
    assert rows(kind, 0) == []


def test_the_same_rows_on_every_machine() -> None:
    """A fixed sample: a change here changes what the shipped weights were made from, and every published number."""
    assert rows("text", 3) == [{"text": "14-28=14"}, {"text": "14+29=43"}, {"text": "89+43=122"}]
    assert [row["prompt"] for row in rows("prompts", 3)] == ["45-87=", "44+48=", "93-87="]


def test_text_is_careless_six_times_in_ten() -> None:
    wrong = differs = 0
    documents = rows("text", 20_000)
    for row in documents:
        assert set(row) == {"text"}
        prompt, answer = row["text"].split("=")
        right = evaluate(prompt + "=")
        a, b = int(prompt[:2]), int(prompt[3:])
        careless = abs(right) if "-" in prompt else right - (10 if a % 10 + b % 10 >= 10 else 0)
        assert int(answer) in (right, careless)
        differs += careless != right
        wrong += int(answer) != right
    # of 8,100 sums 45 in 100 carry (3,645) and of 8,100 differences 90*89/2 are negative (4,005): 7,650 of 16,200
    assert differs / len(documents) == pytest.approx(7_650 / 16_200, abs=0.015)
    assert wrong / differs == pytest.approx(CARELESS_SHARE, abs=0.02)


@pytest.mark.parametrize("kind", DISTINCT)
def test_problems_are_distinct_and_the_held_out_ones_apart(kind: str) -> None:
    train = {row["prompt"] for row in rows(kind, TRAINING, seed=1)}
    held_out = {row["prompt"] for row in rows(kind, HELD_OUT, seed=2, held_out=True)}
    assert (len(train), len(held_out)) == (TRAINING, HELD_OUT)
    assert not train & held_out


def test_the_text_holds_no_held_out_problem() -> None:
    held_out = {row["prompt"] for row in rows("prompts", HELD_OUT, held_out=True)}
    assert not {row["text"].split("=")[0] + "=" for row in rows("text", 20_000)} & held_out
    assert {row["text"].split("=")[0] + "=" for row in rows("text", 2_000, held_out=True)} <= held_out


def test_every_answer_verifies() -> None:
    for kind in DISTINCT:
        assert all(row["answer"] == str(evaluate(row["prompt"])) for row in rows(kind, 1_000))
    for row in rows("prompt_completion", 1_000):
        assert set(row) == {"prompt", "completion", "answer"}
        assert row["completion"].strip() == row["answer"]


def test_pairs_prefer_the_right_answer() -> None:
    pairs = rows("pairs", TRAINING)
    assert set(pairs[0]) == {"prompt", "chosen", "rejected", "answer"}
    assert all(row["chosen"] == row["answer"] != row["rejected"] for row in pairs)
    negative = [row for row in pairs if row["answer"].startswith("-")]
    unsigned = sum(row["rejected"] == row["answer"][1:] for row in negative) / len(negative)
    assert unsigned == pytest.approx(CARELESS_SHARE, abs=0.02)


def test_groups_hold_one_right_answer_of_four() -> None:
    places = [0] * 4
    for row in rows("groups", TRAINING):
        assert set(row) == {"prompt", "responses", "rewards", "answer"}
        assert len(set(row["responses"])) == 4
        assert row["rewards"] == [float(response.strip() == row["answer"]) for response in row["responses"]]
        assert sum(row["rewards"]) == 1.0
        places[row["rewards"].index(1.0)] += 1
        if row["answer"].startswith("-"):
            assert row["answer"][1:] in row["responses"]
    assert min(places) > 0.23 * TRAINING  # the right one stands anywhere


def test_errors_name_what_is_allowed() -> None:
    with pytest.raises(DataError, match="'poems'; allowed: text, prompt_completion, pairs, groups, prompts"):
        rows("poems", 1)
    with pytest.raises(DataError, match="1620 distinct held-out problems, got count=1621"):
        rows("pairs", 1_621, held_out=True)
    with pytest.raises(DataError, match="got count=-1"):
        rows("text", -1)


def test_the_shipped_tokenizer_is_the_one_built() -> None:
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    assert json.loads((DIRECTORY / "tokenizer.json").read_text(encoding="utf-8")) == built


def test_the_tokenizer_is_one_character_a_token_and_round_trips() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    for text in ("47+38=85", "23-58=-35", CHARACTERS, "a  b , it 's\n\n [x] "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("7é7")["input_ids"] == [11, tokenizer.unk_token_id, 11]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token is None
    assert tokenizer.chat_template is None
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.model_max_length == tokenizer.model_max_length == 64


def test_the_model_loads_and_is_small() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    assert sum(p.numel() for p in model.parameters()) == 865_792  # 4 x 213,248 a layer + 99 x 128 tied + 128
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert model.config.model_type == "llama"
