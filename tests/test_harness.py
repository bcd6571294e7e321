"""Tasks of lm-eval's on our network: its scores, our intervals, and records that two runs are joined by. Local tasks alone."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import norm

from posttrain import stats
from posttrain.cli import main
from posttrain.config import resolve
from posttrain.data import embedded
from posttrain.models.embedded import DIRECTORY
from posttrain.records import read_records
from posttrain.tools import harness_scores
from posttrain.tools.evaluate import evaluate

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'posttrain[harness]'")
pytestmark = pytest.mark.usefixtures("warm_process", "tasks")
DOCUMENTS = 40


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine`: a choice, a generation with two filters, a rolling one, a group of two; lm-eval's own 14,000 are not read."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    lm_eval.tasks.TaskManager.load = True  # type: ignore[attr-defined]
    rows = [sum_of(row, i) for i, row in enumerate(embedded.rows("groups", DOCUMENTS - 1))]
    write("choice", [*rows, rows[0]], output_type="multiple_choice", doc_to_choice="choices", doc_to_target="place",
          metric_list=[metric("acc"), metric("acc_norm")], tag="sums")  # fmt: skip
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict", r"^(-?\d+)$"), ("even", r"^(-?\d*[02468])$"))
    ]
    write("written", rows, output_type="generate_until", doc_to_target="answer", filter_list=filters,
          generation_kwargs={"until": ["\n"], "max_gen_toks": 6}, metric_list=[metric("exact_match")])  # fmt: skip
    write("read", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}{{answer}}",
          metric_list=[metric("word_perplexity", "weighted_perplexity"), metric("bits_per_byte", "bits_per_byte")])  # fmt: skip
    write("choice_few", rows[:10], output_type="multiple_choice", doc_to_choice="choices", doc_to_target="place",
          metric_list=[metric("acc")])  # fmt: skip
    for name, by_size in (("pooled", True), ("averaged", False)):
        group = {"group": name, "task": ["choice", "choice_few"]}
        group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": by_size}]
        Path("mine", f"{name}.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")


def sum_of(row: dict[str, Any], place: int) -> dict[str, Any]:
    """A sum, its answers (the first is right) beginning at another one in each row, and where the right one stands."""
    choices = sorted(row["responses"], key=lambda answer: -row["rewards"][row["responses"].index(answer)])
    at = place % len(choices)
    return {"question": row["prompt"], "choices": choices[-at:] + choices[:-at] if at else choices, "place": at,
            "answer": choices[0]}  # fmt: skip


def metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": aggregation == "mean"}


def write(name: str, rows: list[dict[str, Any]], **task: Any) -> None:
    """mine/<name>.yaml and its data."""
    Path("mine").mkdir(exist_ok=True)
    data = Path(f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(Path("datasets").resolve())},
        "test_split": "train",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    } | task
    Path("mine", f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def arguments(*overrides: str, names: str = "choice") -> list[str]:
    given = ["model.path=embedded", "precision=fp32", "eval.resamples=300", "eval.harness_path=mine"]
    return [*given, f"eval.harness=[{names}]", *overrides]


def run(folder: str, *overrides: str, names: str = "choice") -> Any:
    return evaluate(resolve(arguments(f"run.dir={folder}", *overrides, names=names), "eval"))


def by_itself(*names: str) -> Any:
    """lm-eval's own command of Python, on the network that transformers loads."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = HFLM(AutoModelForCausalLM.from_pretrained(DIRECTORY), tokenizer=AutoTokenizer.from_pretrained(DIRECTORY))
    manager = lm_eval.tasks.TaskManager(include_path="mine")
    return lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)


def records(folder: str, task: str) -> tuple[list[str], dict[str, Any]]:
    ids, clusters, columns = read_records(Path(folder, "eval", f"harness-{task}.parquet"))
    assert clusters == ids
    return ids, columns


def lines(folder: str, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "eval", f"harness-{task}.jsonl").read_text("utf-8").splitlines()]


def test_the_scores_are_lm_evals_and_the_intervals_ours(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks the machine for seconds
    theirs = by_itself("choice", "written", "read")
    found = run("r", names="choice,written,read").metrics
    scored = {
        (task, name, s["filter"])
        for task in ("choice", "written")
        for s in theirs["samples"][task]
        for name in s["metrics"]
    }
    assert len(scored) == 4
    for task, name, by in scored:
        column = [s[name] for s in theirs["samples"][task] if s["filter"] == by]
        label = f"{name},{by}" if task == "written" else name
        np.testing.assert_array_equal(records("r", task)[1][label], column)
        metric_found = found[f"harness/{task}/{label}"]
        assert metric_found["value"] == pytest.approx(theirs["results"][task][f"{name},{by}"], abs=1e-12)
        assert metric_found == stats.wilson(sum(column), len(column)).as_dict()
        assert 0 < sum(column) < len(column), "a score that tells right from wrong"
    assert {name for name in found if "written" in name} == {
        "harness/written/exact_match,strict",
        "harness/written/exact_match,even",
    }
    words, bits = found["harness/read/word_perplexity"], found["harness/read/bits_per_byte"]
    assert words["value"] == pytest.approx(theirs["results"]["read"]["word_perplexity,none"], rel=1e-5)
    assert bits["value"] == pytest.approx(theirs["results"]["read"]["bits_per_byte,none"], rel=1e-5)
    assert words["low"] < words["value"] < words["high"]
    assert bits["low"] < bits["value"] < bits["high"]
    logged = [json.loads(line) for line in Path("r/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [(line["split"], line["step"], line["metrics"]) for line in logged] == [("eval", 0, found)]
    assert json.loads(Path("r/summary.json").read_text("utf-8"))["metrics"] == found
    facts = json.loads(Path("r/environment.json").read_text("utf-8"))["harness"]["choice"]
    assert facts == {"version": 1.0, "shots": 0, "documents": DOCUMENTS, "documents_in_all": DOCUMENTS}
    said = capsys.readouterr().out
    assert "harness: prompts as plain text (the tokenizer has no chat template)" in said
    assert f"harness/choice: {DOCUMENTS} documents, 0 few-shot examples, version 1.0" in said
    assert "harness/choice/acc" in said


def test_the_rows_to_read() -> None:
    run("r", names="choice,written,read")
    for row in lines("r", "choice"):
        assert row["metrics"]["acc"] == (row["answer"] == row["target"])
        assert row["answer"] == max(row["choices"], key=lambda choice: choice["logprob"])["text"]
    assert lines("r", "choice")[0]["prompt"] == lines("r", "written")[0]["prompt"]
    for row in lines("r", "written"):
        assert row["metrics"]["exact_match,strict"] == (row["answer"] == row["target"] == row["filtered"]["strict"])
        assert row["filtered"]["even"] in (row["answer"], "[invalid]")
    for row in lines("r", "read"):
        assert row["prompt"] == row["target"]
        assert row["logprob"][0] < 0


def test_two_runs_are_joined_by_id() -> None:
    """The same documents in another order, and another model of them."""
    run("a")
    data = Path("choice.jsonl")
    data.write_text("".join(reversed(data.read_text("utf-8").splitlines(keepends=True))), encoding="utf-8")
    run("b", "model.init=config")
    (ids_a, a), (ids_b, b) = records("a", "choice"), records("b", "choice")
    assert ids_a != ids_b
    assert [i for i in ids_a if "-" in i] == [f"{ids_a[0]}-2"], "the last document is the first again"
    found = stats.paired(a, ids_a, b, ids_b)
    assert found["acc"].value == pytest.approx(a["acc"].mean() - b["acc"].mean())
    discordant = sum(
        x != y for x, y in zip(a["acc"], [dict(zip(ids_b, b["acc"], strict=True))[i] for i in ids_a], strict=True)
    )
    assert discordant > 0
    assert found["acc"].better


def test_with_data_both_are_scored() -> None:
    data = ["data.eval=embedded:prompt_completion:12:held_out", "data.max_length=64", "eval.generate=0"]
    found = run("r", *data, "eval.harness_limit=5").metrics
    assert found["harness/choice/acc"]["n"] == 5
    assert found["nll"]["clusters"] == 12
    logged = [json.loads(line) for line in Path("r/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["metrics"] for line in logged] == [found]
    assert {path.name for path in Path("r/eval").iterdir()} == {
        "step-000000.parquet", "examples.parquet", "temperature.json", "harness-choice.parquet", "harness-choice.jsonl",
    }  # fmt: skip


def test_a_groups_score(capsys: pytest.CaptureFixture[str]) -> None:
    """By sizes it is the share of all documents right; the mean of the tasks' scores is another number, without interval."""
    first = run("a", names="pooled").metrics
    hits = sum(records("a", task)[1]["acc"].sum() for task in ("choice", "choice_few"))
    assert first["harness/pooled/acc"] == stats.wilson(hits, DOCUMENTS + 10).as_dict()
    second = run("b", names="averaged").metrics["harness/averaged/acc"]
    parts = [first[f"harness/{task}/acc"]["value"] for task in ("choice", "choice_few")]
    assert second["value"] == pytest.approx(np.mean(parts))
    assert second["low"] is None
    assert "no interval" in second["method"]
    assert "no interval" in capsys.readouterr().out


def test_shots_and_limit_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    run("r", "eval.harness_limit=6", "eval.harness_shots=2")
    assert f"harness/choice: the first 6 of {DOCUMENTS} documents, 2 few-shot examples" in capsys.readouterr().out
    row = lines("r", "choice")[0]
    assert row["prompt"].count("=") == 3
    task = yaml.safe_load(Path("mine/choice.yaml").read_text("utf-8")) | {"num_fewshot": 0}
    Path("mine/choice.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    run("s", "eval.harness_limit=6", "eval.harness_shots=2")
    assert "0 few-shot examples (set by the task itself, so not 2)" in capsys.readouterr().out
    assert lines("s", "choice")[0]["prompt"].count("=") == 1
    assert lines("s", "choice")[0]["id"] == row["id"]


def test_the_chat_template_is_applied_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    template = "model.chat_template={% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}="
    run("r", template, "eval.harness_limit=2")
    assert lines("r", "choice")[0]["prompt"].startswith("<user>")
    assert "harness: prompts in the chat template" in capsys.readouterr().out
    run("s", template, "eval.harness_limit=2", "data.template=none")
    assert "<user>" not in lines("s", "choice")[0]["prompt"]
    assert "harness: prompts as plain text (data.template=none)" in capsys.readouterr().out


def test_an_adapters_run_is_resolved_as_everywhere() -> None:
    from conftest import small_arguments

    import posttrain

    posttrain.run(small_arguments("adapter=lora", "run.dir=trained", "train.steps=2", "optim.lr=0.05"))
    base, trained = run("a").metrics, run("b", "model.path=trained").metrics
    assert [c["logprob"] for c in lines("a", "choice")[0]["choices"]] != [
        c["logprob"] for c in lines("b", "choice")[0]["choices"]
    ]
    assert base.keys() == trained.keys()


SCORING = harness_scores.Scoring(0.95, 500, 0)


class Task:
    """What score_task asks of lm-eval's."""

    OUTPUT_TYPE = "generate_until"

    def __init__(self, **functions: Any) -> None:
        self.functions = functions

    def aggregation(self) -> dict[str, Any]:
        return self.functions

    def higher_is_better(self) -> dict[str, bool]:
        return {}


def scored(values: list[Any], theirs: Any, how: Any) -> harness_scores.TaskScores:
    samples = [
        {"doc_id": i, "doc": {"n": i}, "filter": "none", "metrics": ["m"], "m": value, "target": "", "arguments": [("", {})],
         "resps": [[""]], "filtered_resps": [""]}
        for i, value in enumerate(values)
    ]  # fmt: skip
    return harness_scores.score_task("t", samples, {"m,none": theirs}, Task(m=how), SCORING)


def mean(_: Any) -> None:
    """Named as lm-eval's."""


def perplexity(_: Any) -> None:
    """Named as lm-eval's."""


def median(_: Any) -> None:
    """Named as lm-eval's."""


def test_numbers_between_have_the_bootstraps_interval() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    found = scored(values.tolist(), values.mean(), mean).metrics["m"]
    half = norm.ppf(0.975) * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)
    assert found.method == "percentile bootstrap"
    assert scored(values[:9].tolist(), values[:9].mean(), mean).metrics["m"].method == "t, few examples"


def test_a_mean_perplexity_is_of_nats_a_document() -> None:
    logprobs = [-1.0, -2.0, -6.0]
    found = scored(logprobs, np.exp(3.0), perplexity)
    assert found.metrics["m"].value == pytest.approx(np.exp(3.0))
    assert list(found.columns) == ["m_nats_sum", "m_nats_count"]


def test_several_items_a_document_are_no_independent_documents() -> None:
    values = [[True] * 5 if i % 2 else [False] * 5 for i in range(60)]
    found = scored(values, 0.5, mean)
    assert found.metrics["m"] == stats.clustered_wilson([sum(v) for v in values], [5] * 60)
    alone = stats.wilson(150, 300)
    assert found.metrics["m"].high - found.metrics["m"].low > 2 * (alone.high - alone.low)
    assert list(found.columns) == ["m_sum", "m_count"]


def test_what_no_mean_gives_is_lm_evals_and_marked() -> None:
    for values, theirs, how in (([1.0, 2.0, 9.0], 2.0, median), ([("a", "b"), ("c", "d")], 31.5, mean)):
        found = scored(values, theirs, how)
        assert found.metrics["m"].value == theirs
        assert found.metrics["m"].low is None
        assert "no interval" in found.metrics["m"].method
        assert not found.columns


def test_another_mean_than_lm_evals_is_told_with_both() -> None:
    found = scored([1.0, 0.0], 0.5 + 1e-6, mean)
    assert found.metrics["m"].value == 0.5 + 1e-6
    assert found.metrics["m"].low is None
    assert found.lines == [
        "harness/t: lm-eval gives m as 0.500001, but the mean of its documents is 0.5; lm-eval's is reported"
    ]
    assert scored([1.0, 0.0], 0.5 + 1e-12, mean).metrics["m"].low is not None


def test_documents_without_a_score_are_counted() -> None:
    found = scored([1.0, None, 0.0, 1.0], 2 / 3, mean)
    assert found.metrics["m"] == stats.wilson(2, 3)
    assert {name: column.tolist() for name, column in found.columns.items()} == {
        "m_sum": [1, 0, 0, 1], "m_count": [1, 0, 1, 1],
    }  # fmt: skip
    assert found.lines == ["harness/t: 1 of 4 documents have no m"]


def test_files_have_safe_names_of_their_own() -> None:
    for name in ("a/b", "a_b"):
        harness_scores.TaskScores(name, ["i"], {"acc": np.ones(1)}).write(Path("x"))
    names = sorted(path.name for path in Path("x").glob("*.parquet"))
    assert len(names) == 2
    assert "harness-a_b.parquet" in names


def tell(capfd: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    assert main(list(argv)) == status
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_is_told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = tell(capfd, "eval", *arguments(names="choic"))
    assert (
        "eval.harness: choic is no task or group of lm-eval or of eval.harness_path=mine; did you mean choice" in said
    )
    assert "lm_eval ls tasks lists them" in tell(capfd, "eval", *arguments(names="zzzzzz"))
    assert "eval.harness_path=nowhere is no folder" in tell(capfd, "eval", *arguments("eval.harness_path=nowhere"))
    for verb in ("train", "plan", "inspect", "prepare"):
        said = tell(capfd, verb, *arguments("data.train=embedded:prompt_completion:50"))
        assert f"eval.harness=[choice] is of posttrain eval alone, not of {verb}" in said
    said = tell(capfd, "eval", *arguments("data.eval=embedded:pairs:20", names=""))
    assert "eval.harness_path=mine is given, but eval.harness names no task" in said
    assert "data.eval" in tell(capfd, "eval", "model.path=embedded")
    write("missing", [], output_type="multiple_choice", dataset_path="org/name", dataset_kwargs={}, doc_to_choice="choices",
          doc_to_target="place", metric_list=[metric("acc")])  # fmt: skip
    said = tell(capfd, "eval", *arguments(names="missing"))
    assert "eval.harness: the task missing cannot be loaded: Couldn't reach 'org/name' on the Hub" in said
    assert len(said.strip().splitlines()) == 1
    said = tell(capfd, "eval", *arguments(names="pooled,choice"))
    assert "Duplicate task 'choice'" in said
    write("unsafe", [{"question": "1", "answer": "1"}], output_type="generate_until", doc_to_target="answer", unsafe_code=True,
          metric_list=[metric("exact_match")])  # fmt: skip
    assert "the task unsafe runs code that the model writes" in tell(capfd, "eval", *arguments(names="unsafe"))
    write("long", [{"question": "1", "answer": "1"}], output_type="generate_until", doc_to_target="answer",
          generation_kwargs={"max_gen_toks": 99}, metric_list=[metric("exact_match")])  # fmt: skip
    assert "requested max tokens to generate (99) must be less" in tell(capfd, "eval", *arguments(names="long"))
    said = tell(capfd, "eval", *arguments("stage=reward", "data.eval=embedded:pairs:20"))
    assert "stage=reward scores the data with a reward model" in said
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'posttrain[harness]'" in tell(capfd, "eval", *arguments())


def test_a_reward_model_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from conftest import small_arguments

    import posttrain

    data = [f"data.{side}=embedded:pairs:40{part}" for side, part in (("train", ""), ("eval", ":held_out"))]
    posttrain.run(small_arguments("stage=reward", "run.dir=judge", "train.steps=1", *data))
    said = tell(capfd, "eval", *arguments("model.path=judge"))
    assert "model.path=judge is a reward model: it scores answers and writes none" in said


def test_what_is_cut_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "1+" * 60 + str(i), "answer": "1"} for i in range(3)]
    write("long", rows, output_type="loglikelihood", doc_to_target="answer", metric_list=[metric("acc")])
    run("r", names="long")
    said = capsys.readouterr().out
    assert "lm-eval warns 3 times, first: Combined length of context (121)" in said
