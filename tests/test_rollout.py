"""Generation over every family: one answer is one answer, whatever is asked beside it, and drawn from what it should be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED, policy

from posttrain import generation
from posttrain.data.batches import collate
from posttrain.data.tokens import TokenGroup
from posttrain.generation import Generation
from posttrain.models.policy import Policy
from posttrain.rollout import generate
from posttrain.sampling import Sampling, filtered, pick

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*mamba.*"),
    pytest.mark.filterwarnings("ignore:.*fast path.*"),
]

ENDS, PAD, ROOM = {1, 7, 20, 41}, 0, 12
PROMPTS = [[5, 9, 33], [8, 2, 61, 17, 40, 3, 77], [12], [44, 90, 13, 6], [5, 9, 34]]
LIBRARY = {"rwkv", "xlstm"}
"""Whose own generation with its state gives other tokens than its forward pass, or ends in an error."""
WRITES = [family for family in FAMILIES if family not in REFUSED and family not in LIBRARY]


def answers(model: Policy, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Generation]:
    return generate(model, prompts, ENDS, PAD, ROOM, **options)


@torch.no_grad()
def one_by_one(model: Policy, prompt: list[int]) -> list[int]:
    """Greedy, by hand: no cache, no padding, the whole text anew for each token."""
    model.eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + ROOM:
        ids.append(int(model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ENDS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", WRITES)
def test_greedy_answers_are_the_models_own(family: str) -> None:
    model = policy(family)
    found = answers(model)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert [*answer.ids, *([answer.end] if answer.finished else [])] == one_by_one(model, prompt)
        assert len(answer.logprobs) == len(answer.ids) + answer.finished


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral"])
def test_what_is_sampled_does_not_depend_on_the_batch(family: str) -> None:
    model, sampling = policy(family), Sampling(1.0, seed=3)
    together = answers(model, sampling=sampling, samples=3)
    alone = [
        answer
        for key, prompt in enumerate(PROMPTS)
        for answer in answers(model, [prompt], sampling=sampling, samples=3, keys=[key])
    ]
    small = answers(model, sampling=sampling, samples=3, batch_tokens=1)
    assert [a.ids for a in together] == [a.ids for a in alone] == [a.ids for a in small]
    assert len({tuple(a.ids) for a in together}) > 10
    assert answers(model, sampling=Sampling(1.0, seed=4), samples=3) != together


def test_rows_that_finished_leave_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = policy("llama"), Sampling(1.0)
    found = answers(model, sampling=sampling, samples=4)
    assert {a.finished for a in found} == {True, False}
    monkeypatch.setattr(generation, "LEAVE", -1.0)
    stayed = answers(model, sampling=sampling, samples=4)
    assert [a.ids for a in stayed] == [a.ids for a in found]


def test_logprobs_are_those_of_the_training_forward() -> None:
    model, temperature = policy("llama"), 0.7
    found = answers(model, sampling=Sampling(temperature), samples=2)
    for place, answer in enumerate(found):
        response = [*answer.ids, *([answer.end] if answer.finished else [])]
        group = TokenGroup("a", "a", PROMPTS[place // 2], [response], [[True] * len(response)], [0], [0], "")
        with torch.no_grad():
            ours = model(collate([group], [[0]], "padded"), temperature=temperature).logprobs
        assert answer.logprobs == pytest.approx(ours.tolist(), abs=1e-5)


def test_the_models_own_settings_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy("llama")
    expected = [answers(model, sampling=s, samples=2) for s in (Sampling(), Sampling(1.0))]
    own = model.network.generation_config
    for name, value in {
        "top_k": 1,
        "repetition_penalty": 9.0,
        "do_sample": True,
        "max_length": 4,
        "min_p": 0.5,
    }.items():
        monkeypatch.setattr(own, name, value, raising=False)
    assert [answers(model, sampling=s, samples=2) for s in (Sampling(), Sampling(1.0))] == expected


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """20,000 draws; 5 standard deviations of each share."""
    logits, count = torch.tensor([1.0, 0.0, -1.0, -30.0]), 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, _, logprob = pick(logits.expand(count, -1), Sampling(2.0), uniform)
    expected = (logits / 2).softmax(-1)
    seen = Counter(token.tolist())
    for i, p in enumerate(expected.tolist()):
        assert seen[i] / count == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)
    assert logprob.tolist() == pytest.approx(expected.log()[token].tolist(), abs=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_filtered_token_is_never_drawn(uniform: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, 0.0]])
    token, *_ = pick(logits, Sampling(1.0, top_k=2), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in (1, 2)


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.25, 0.05]]).log()
    for mass, kept in ((0.4, [0]), (0.5, [0]), (0.6, [0, 2]), (0.75, [0, 2]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        assert filtered(logits, None, mass - 1e-6 if mass < 1 else mass)[0].isfinite().nonzero()[:, 0].tolist() == kept
    assert filtered(logits, 3, 0.6)[0].isfinite().nonzero()[:, 0].tolist() == [0, 2]


def test_an_answer_ends_where_the_positions_do() -> None:
    model = policy("gpt2")
    found = generate(model, [[5] * 60], {98}, PAD, 30)
    assert 1 <= len(found[0].ids) <= 4
