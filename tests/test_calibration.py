"""The temperature of tokens: fitted without keeping logits, to what fitting on all logits gives; and what is done with it."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_arguments
from transformers import AutoModelForCausalLM

from posttrain import evaluate, stats
from posttrain.calibration import usable
from posttrain.config import resolve
from posttrain.data.packing import Packing
from posttrain.data.pipeline import prepare
from posttrain.errors import ConfigError, ModelError
from posttrain.evaluate import Evaluation, Evaluator
from posttrain.models.embedded import DIRECTORY
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import Networks, build_network
from posttrain.records import read_calibrated, read_records, write_records
from posttrain.runtime import Runtime
from posttrain.stages.likelihood import fitted_tokens
from posttrain.tools.chat import chat, fitted_temperature
from posttrain.tools.merge import merge

Run = Callable[..., Any]
PAIRS = (
    "data.train=embedded:pairs:1000", "data.eval=embedded:pairs:300:held_out", "optim.lr=1e-4", "train.steps=20",
    "batch.size=64",
)  # fmt: skip
"""Enough that something is learnt, so that the fit ends inside its bounds."""


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Evaluation, list[Any]]]:
    """found(budget, layout) → the embedded model's final evaluation and the examples it was of."""

    def made(budget: int = 10**9, layout: str = "padded") -> tuple[Evaluation, list[Any]]:
        monkeypatch.setattr(evaluate, "FITTED_TOKENS", budget)
        cfg = resolve(small_arguments("eval.resamples=300", "data.eval=embedded:prompt_completion:120:held_out"))
        tokenizer = load_tokenizer(cfg.model)
        data = prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed).eval
        policy, _ = build_network(cfg.model, cfg.adapter, torch.float32, cfg.train.seed)
        networks = Networks(policy, policy, tokenizer)
        runtime = Runtime("fp32", "ddp")
        evaluator = Evaluator(
            cfg.stage,
            networks,
            data,
            Packing(layout, 200),
            runtime,
            cfg.eval,
            set(),
            cfg.train.seed,  # type: ignore[arg-type]
        )
        return evaluator(0, final=True), data.groups(range(len(data)))

    return made


def logits_of(groups: list[Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every target's logits, its id, and its example, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    rows, labels, names = [], [], []
    for group in groups:
        ids = group.prompt + group.responses[0]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for place, target in enumerate([False] * len(group.prompt) + group.masks[0]):
            if target:
                rows.append(logits[place - 1].numpy())
                labels.append(ids[place])
                names.append(group.cluster)
    return np.stack(rows), np.array(labels), names


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_it_is_what_fitting_on_all_logits_gives(found: Any, layout: str) -> None:
    evaluation, groups = found(layout=layout)
    logits, labels, names = logits_of(groups)
    fit = ~stats.held_out(names, 42)
    expected = stats.fit_temperature(logits[fit], labels[fit], clusters=np.array(names)[fit])
    fitted = evaluation.metrics["temperature"]
    assert fitted.n == fit.sum()
    assert fitted.value == pytest.approx(expected.value, rel=5e-3)
    assert (fitted.low, fitted.high) == pytest.approx((expected.low, expected.high), rel=0.03)


def test_the_bins_at_it_are_those_of_the_scaled_logits_on_the_other_half(found: Any) -> None:
    evaluation, groups = found()
    logits, labels, names = logits_of(groups)
    other = stats.held_out(names, 42)
    scaled = logits[other] / evaluation.metrics["temperature"].value
    confidence = np.exp(scaled - np.logaddexp.reduce(scaled, 1, keepdims=True)).max(1)
    expected = stats.ece(
        confidence, scaled.argmax(1) == labels[other], clusters=np.array(names)[other], resamples=300, seed=42
    )
    told = evaluation.metrics["ece_calibrated"]
    assert told.n == other.sum()
    assert told.value == pytest.approx(expected.value, abs=1e-5)
    plain = logits[other]
    confidence = np.exp(plain - np.logaddexp.reduce(plain, 1, keepdims=True)).max(1)
    expected = stats.ece(confidence, plain.argmax(1) == labels[other], resamples=300)
    assert evaluation.metrics["ece_uncalibrated"].value == pytest.approx(expected.value, abs=1e-5)


def test_equal_mass_bins_are_those_of_the_logits(found: Any) -> None:
    evaluation, groups = found()
    logits, labels, names = logits_of(groups)
    confidence = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True)).max(1)
    right = logits.argmax(1) == labels
    expected = stats.ece(confidence, right, clusters=names, equal_mass=True, resamples=300, seed=42)
    told = evaluation.metrics["ece_equal_mass"]
    assert told.n == len(labels)
    for name in ("value", "low", "high", "noise_floor"):
        assert getattr(told, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    blocks = zip(*(np.array_split(part[np.argsort(confidence)], 15) for part in (confidence, right)), strict=True)
    gaps = [abs(hits.sum() - sure.sum()) / len(labels) for sure, hits in blocks]
    assert told.value == pytest.approx(sum(gaps), abs=0.01)  # half of the tokens share the uppermost fine bins


def test_the_file_gives_back_every_bin(found: Any) -> None:
    evaluation, _ = found()
    write_records(Path("r.parquet"), evaluation)
    ids, clusters, records = read_records(Path("r.parquet"))
    assert (ids, clusters) == (evaluation.ids, evaluation.clusters)
    for kept, read in ((evaluation.records, records), (evaluation.calibrated, read_calibrated(Path("r.parquet")))):
        assert kept.keys() == read.keys()
        for name, column in kept.items():
            assert all(np.array_equal(one, other) for one, other in zip(column, read[name], strict=True)), name
    assert sum(map(len, evaluation.calibrated["bin_at"])) > 0
    assert [len(at) > 0 for at in evaluation.calibrated["bin_at"]] == stats.held_out(clusters, 42).tolist()


def test_one_token_in_so_many_is_enough(found: Any) -> None:
    whole, part = found()[0], found(budget=200)[0]
    assert 60 < part.metrics["temperature"].n < 160 < whole.metrics["temperature"].n
    ends = part.metrics["temperature"].low, part.metrics["temperature"].high
    assert ends[0] < whole.metrics["temperature"].value < ends[1]
    assert part.records["grid_items"].sum() < whole.records["grid_items"].sum()
    assert part.metrics["nll"].value == whole.metrics["nll"].value


def test_which_tokens_are_taken_is_their_examples_to_say() -> None:
    def batch(ids: list[str], lengths: list[int]) -> Any:
        owner = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths))
        return SimpleNamespace(ids=ids, group=torch.arange(len(ids)), response=owner)

    together = fitted_tokens(batch(["a", "b", "c"], [7, 1, 12]), 3).tolist()  # type: ignore[arg-type]
    alone = [fitted_tokens(batch([i], [n]), 3).tolist() for i, n in (("a", 7), ("b", 1), ("c", 12))]  # type: ignore[arg-type]
    starts = (0, 7, 8)
    assert together == [start + place for start, places in zip(starts, alone, strict=True) for place in places]
    assert all(b - a == 3 for places in alone for a, b in pairwise(places))
    assert fitted_tokens(batch(["a"], [5]), 1).tolist() == [0, 1, 2, 3, 4]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "of"),
    [
        (("stage=sft",), "tokens"),
        (("stage=dpo", *PAIRS), "pairs"),
    ],
)
def test_it_stands_beside_the_model(run: Run, stage: tuple[str, ...], of: str) -> None:
    summary = run(*stage, "run.dir=r")
    kept = json.loads(Path("r/model/temperature.json").read_text())
    assert kept["temperature"] == summary.metrics["temperature"]
    assert kept["ece_calibrated"] == summary.metrics["ece_calibrated"]
    assert kept["of"] == of
    assert kept["temperature"]["low"] < kept["temperature"]["value"] < kept["temperature"]["high"]
    assert kept["nll_after"]["n"] == kept["nll_before"]["n"]


def test_at_a_bound_it_is_not_to_be_used() -> None:
    assert usable({"temperature": {"value": 0.25, "low": None, "high": None, "se": None, "n": 9, "clusters": 9,
                                   "method": "T = 0.25 is a bound, no interval"}}) is None  # fmt: skip
    assert usable({}) is None


def test_chat_takes_it(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run("run.dir=r")
    capsys.readouterr()
    fitted = fitted_temperature("r")
    assert fitted is not None
    assert fitted.value == summary.metrics["temperature"]["value"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+13=\n"))
    chat(["r", "--temperature", "fitted"])
    assert capsys.readouterr().out.strip()
    Path("r/model/temperature.json").unlink()
    with pytest.raises(ConfigError, match="no temperature was fitted to the tokens of r"):
        chat(["r", "--temperature", "fitted"])


def test_a_run_that_only_had_to_be_finished_has_the_same(run: Run) -> None:
    """Killed after its last checkpoint: what the evaluation found is read back."""
    run("run.dir=r")
    whole = Path("r/model/temperature.json").read_text()
    Path("r/summary.json").unlink()
    shutil.rmtree("r/model")
    run("run.dir=r")
    assert Path("r/model/temperature.json").read_text() == whole


def test_a_damaged_file_is_named(run: Run) -> None:
    run("run.dir=r")
    Path("r/model/temperature.json").write_text("{")
    with pytest.raises(ModelError, match=r"temperature\.json cannot be read"):
        fitted_temperature("r")


def test_merging_keeps_it(run: Run) -> None:
    run("adapter=lora", "run.dir=r")
    merge(["r", "merged"])
    assert fitted_temperature("merged") == fitted_temperature("r")
