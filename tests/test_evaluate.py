"""From the same records, in any order and from any number of ranks, the same bits."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_arguments

from posttrain import stats
from posttrain.answers import Sample
from posttrain.config import resolve
from posttrain.data.packing import Packing
from posttrain.data.pipeline import prepare
from posttrain.evaluate import Evaluation, Evaluator
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import Networks, build_network
from posttrain.records import read_records
from posttrain.report.samples import write as write_samples
from posttrain.rundir import RunDir


class Rank:
    """One of several ranks whose records are put together by the test, in an order of its own."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.is_main, self.device = rank, world, rank == 0, torch.device("cpu")
        self.gathered: list[list[Any]] = []

    def gather(self, items: list[Any]) -> list[Any]:
        self.gathered.append(items)
        return items

    def share(self, value: Any) -> Any:
        return value


@pytest.fixture(scope="module")
def evaluator() -> Any:
    """evaluator(rank, world) → Evaluator over 40 examples in batches of a few."""
    cfg = resolve(small_arguments("eval.resamples=300"))
    tokenizer = load_tokenizer(cfg.model)
    data = prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed).eval
    policy, _ = build_network(cfg.model, cfg.adapter, torch.float32, cfg.train.seed, head=cfg.stage.head({1}))
    networks = Networks(policy, policy, tokenizer)

    def made(rank: int, world: int) -> Evaluator:
        packing = Packing("padded", 64, overhead_tokens=1)
        return Evaluator(cfg.stage, networks, data, packing, Rank(rank, world), cfg.eval, set(), 0)  # type: ignore[arg-type]

    return made


def parts_of(evaluator: Any, world: int) -> list[Any]:
    """What all ranks gather, in rank order."""
    found: list[Any] = []
    for rank in range(world):
        one = evaluator(rank, world)
        one(0)
        found += one.runtime.gathered[0]
    return found


def same(a: Evaluation, b: Evaluation) -> bool:
    def flat(column: np.ndarray) -> np.ndarray:
        return np.concatenate(column) if column.dtype == object else column

    columns = all(np.array_equal(flat(a.records[name]), flat(b.records[name]), equal_nan=True) for name in a.records)
    return repr(a.metrics) == repr(b.metrics) and a.ids == b.ids and a.clusters == b.clusters and columns


def test_the_order_of_records_changes_no_bit(evaluator: Any) -> None:
    parts = parts_of(evaluator, 1)
    assert len(parts) > 5
    answers = [Sample(i, "", "", "", True, n % 3 == 0, True) for n, i in enumerate(parts[0][0] + parts[1][0])]
    one = evaluator(0, 1)
    expected = one._summarise(0, parts, answers, True)
    assert expected.metrics["nll"].low < expected.metrics["nll"].value < expected.metrics["nll"].high
    assert expected.metrics["accuracy"].n == len(answers)
    for seed in range(5):
        shuffled = [shuffle_rows(part, seed) for part in random.Random(seed).sample(parts, len(parts))]
        assert same(one._summarise(0, shuffled, random.Random(seed).sample(answers, len(answers)), True), expected)
    parts[0][2]["nll_sum"][0] += 1e-9
    assert not same(one._summarise(0, parts, answers, True), expected), "this test sees the last digits"


def shuffle_rows(part: Any, seed: int) -> Any:
    ids, clusters, columns = part
    order = np.random.default_rng(seed).permutation(len(ids))
    return [ids[i] for i in order], [clusters[i] for i in order], {name: c[order] for name, c in columns.items()}


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_number_of_ranks_changes_no_bit(evaluator: Any, world: int) -> None:
    one = evaluator(0, 1)
    expected = one._summarise(0, parts_of(evaluator, 1), [], True)
    parts = parts_of(evaluator, world)
    assert same(one._summarise(0, parts, [], True), expected)
    assert same(one._summarise(0, parts[::-1], [], True), expected)


def test_copies_of_an_example_are_one_observation(run: Any) -> None:
    """Twelve examples five times over have the interval of twelve, and lie on one side of the temperature's halves."""
    rows = [
        json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i), "answer": str(2 * i)}) + "\n"
        for i in range(10, 22)
    ]
    Path("once.jsonl").write_text("".join(rows))
    Path("often.jsonl").write_text("".join(rows * 5))
    options = ("train.steps=1", "optim.lr=1e-30", "eval.generate=100", "eval.verifier=exact", "eval.max_new_tokens=4")
    once, often = (run(*options, f"data.eval={name}.jsonl", f"run.dir={name}").metrics for name in ("once", "often"))
    for name in ("nll", "accuracy"):
        assert often[name]["clusters"] == once[name]["clusters"] == 12
        assert often[name]["value"] == pytest.approx(once[name]["value"])
        assert often[name]["low"] <= once[name]["low"] + 0.02  # of answers by t, where singles have Wilson's z
    ids, clusters, _ = read_records(Path("often/eval/step-000001.parquet"))
    assert len(set(ids)) == 60
    held = {cluster: set() for cluster in clusters}
    for cluster, other in zip(clusters, stats.held_out(clusters, 42), strict=True):
        held[cluster].add(bool(other))
    assert all(len(sides) == 1 for sides in held.values())


def test_a_lost_answer_is_not_invented(tmp_path: Path) -> None:
    sample = Sample("a", "p", "4", "4", True)
    write_samples(RunDir(tmp_path), [], [sample], 3)
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert line["before"] is None
    assert line["after"]["answer"] == "4"
