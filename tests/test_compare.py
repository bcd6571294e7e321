"""Runs compared from their records: the numbers, the sentences, and sets that do not match."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import stats
from posttrain.cli import main
from posttrain.comparison import compare_runs
from posttrain.errors import ConfigError, DataError
from posttrain.records import read_records, write_table
from posttrain.tools.compare import compare

Run = Callable[..., Any]
ANSWERED = ("eval.generate=20", "eval.verifier=exact", "eval.max_new_tokens=6", "train.steps=20")


def row(found: dict[str, Any], metric: str, table: int = 0) -> dict[str, Any]:
    (one,) = [each for each in found["tables"][table]["rows"] if each["metric"] == metric]
    return one


@pytest.fixture
def pair(run: Run) -> None:
    """Runs a and b: the second learns ten times as fast, and answers."""
    run(*ANSWERED, "optim.lr=1e-4", "run.dir=a")
    run(*ANSWERED, "optim.lr=1e-3", "run.dir=runs/b")


def test_differences_are_those_of_the_records(pair: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "runs/b", "--json", "found.json", "--resamples", "500"]) == 0
    found = json.loads(Path("found.json").read_text())
    a, b = (read_records(Path(f"{name}/eval/step-000020.parquet")) for name in ("a", "runs/b"))
    expected = stats.paired_difference(
        b[2]["nll_sum"], a[2]["nll_sum"], b[2]["tokens"], a[2]["tokens"], ids_a=b[0], ids_b=a[0], resamples=500,
        lower_is_better=True,
    )  # fmt: skip
    nll = row(found, "nll")
    assert nll["change"]["value"] == pytest.approx(expected.value)
    assert nll["change"]["se"] == pytest.approx(expected.se)
    assert (nll["change"]["wins"], nll["change"]["losses"]) == (expected.wins, expected.losses)
    assert nll["baseline"]["value"] == pytest.approx(a[2]["nll_sum"].sum() / a[2]["tokens"].sum())
    accuracy = row(found, "accuracy")["change"]
    right = [np.nan_to_num(side[2]["accuracy"], nan=-1) for side in (a, b)]
    only = [int(((right[i] == 1) & (right[1 - i] == 0)).sum()) for i in (0, 1)]
    assert accuracy["p_value"] == pytest.approx(stats.mcnemar(only[1], only[0]))
    assert (accuracy["wins"], accuracy["losses"]) == (only[1], only[0])
    assert [difference[0] for difference in found["differs"]] == ["optim.lr"]
    told = capsys.readouterr().out
    assert "nll: b is " in told
    assert Path("runs/b/compare.html").is_file()


def test_those_who_moved_most(pair: None) -> None:
    found = compare_runs(["a", "runs/b"])
    ids, _, before = read_records(Path("a/eval/step-000020.parquet"))
    after = read_records(Path("runs/b/eval/step-000020.parquet"))[2]
    change = dict(zip(ids, after["nll_sum"] / after["tokens"] - before["nll_sum"] / before["tokens"], strict=True))
    (nll,) = [movers for movers in found["movers"] if movers["metric"] == "nll"]
    worst = sorted(change, key=change.__getitem__)[::-1]
    assert [each["id"] for each in nll["losses"]] == [i for i in worst[:5] if change[i] > 0]
    assert [each["change"] for each in nll["gains"]] == pytest.approx(
        [change[i] for i in worst[::-1][:5] if change[i] < 0]
    )
    assert nll["gains"] or nll["losses"]
    answers = {line["id"]: line for line in map(json.loads, Path("runs/b/samples.jsonl").read_text().splitlines())}
    for each in nll["losses"] + nll["gains"]:
        assert "+" in each["question"] or "-" in each["question"]
        if each["id"] in answers:
            assert each["now"] == answers[each["id"]]["after"]["answer"]
            assert each["reference"] == answers[each["id"]]["reference"]


def test_a_run_and_itself(pair: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("a", "same")
    assert main(["compare", "a", "same"]) == 0
    told = capsys.readouterr().out
    assert " is better than " not in told
    assert " is worse than " not in told
    assert "no detectable change" in told
    found = compare_runs(["a", "same"])
    assert {each["change"]["value"] for each in found["tables"][0]["rows"]} == {0.0}
    assert not any(movers["losses"] or movers["gains"] for movers in found["movers"])


def test_three_runs_and_an_earlier_step(run: Run) -> None:
    run("optim.lr=1e-3", "train.steps=8", "train.eval_every=4", "run.dir=a")
    run("optim.lr=1e-30", "train.steps=4", "run.dir=b")
    found = compare_runs(["a", "b", "a@4"])
    assert [(each["name"], each["step"]) for each in found["runs"]] == [("a", 8), ("b", 4), ("a@4", 4)]
    tested = [
        each for table in found["tables"] for each in table["rows"]
        if each["metric"] in ("nll", "bits_per_byte", "token_accuracy", "brier", "ece", "ece_equal_mass")
    ]  # fmt: skip
    corrected = stats.holm([each["change"]["p_value"] for each in tested])
    assert [each["p_holm"] for each in tested] == pytest.approx(corrected.tolist())
    assert row(found, "perplexity")["p_holm"] == row(found, "nll")["p_holm"]
    assert found["note"].startswith("12 scores are compared")
    with pytest.raises(ConfigError, match="no evaluation at step 5; there are 0, 4, 8"):
        compare_runs(["a", "a@5"])


def test_sets_that_do_not_match_are_refused_and_it_is_said_why(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("run.dir=a")
    run("run.dir=b", "data.eval=embedded:prompt_completion:30:held_out")
    assert main(["compare", "a", "b"]) == 2
    told = capsys.readouterr().err
    assert "were not scored on the same examples" in told
    assert (
        "data.eval: embedded:prompt_completion:40:held_out there, embedded:prompt_completion:30:held_out here" in told
    )
    run("stage=ppo", "data.train=embedded:prompts:20", "data.eval=embedded:prompts:40:held_out", "stage.rewards=[exact]",
        "stage.max_new_tokens=4", "eval.generate=40", "run.dir=c", "batch.size=4", "stage.epochs=1")  # fmt: skip
    with pytest.raises(DataError, match=r"no score in common|not scored on the same"):
        compare_runs(["a", "c"])


def test_accuracy_is_of_the_prompts_that_both_have_answered(run: Run) -> None:
    run(*ANSWERED, "run.dir=a")
    run(*ANSWERED, "eval.generate=12", "optim.lr=1e-3", "run.dir=b")
    change = row(compare_runs(["a", "b"]), "accuracy")["change"]
    assert change["clusters"] == 12
    assert change["note"] == "of 12 prompts that both have answered; of 8 only one has"


def test_what_is_no_run(run: Run) -> None:
    with pytest.raises(ConfigError, match="takes two runs or more"):
        compare(["a"])
    with pytest.raises(ConfigError, match="nowhere is no run"):
        compare(["nowhere", "a"])
    run("run.dir=bare", "data.eval=", "data.eval_fraction=0")
    with pytest.raises(ConfigError, match="bare has no evaluation with records"):
        compare_runs(["bare", "bare"])


def test_harness_tasks_are_joined_by_document(run: Run) -> None:
    """Their records are made here as posttrain eval leaves them; tests/test_harness.py runs the harness itself."""
    for name, hits in (("a", [1.0, 0.0, 0.0, 1.0]), ("b", [1.0, 1.0, 0.0, 1.0])):
        run("run.dir=" + name, "train.steps=1")
        write_table(Path(name, "eval/harness-arc.parquet"), {"id": list("wxyz"), "cluster": list("wxyz"), "acc": hits})
    change = row(compare_runs(["a", "b"]), "harness/arc/acc")["change"]
    assert change["value"] == 0.25
    assert (change["wins"], change["ties"], change["losses"]) == (1, 3, 0)
    assert change["test"] == "McNemar exact"
    write_table(Path("b/eval/harness-arc.parquet"), {"id": list("wxy"), "cluster": list("wxy"), "acc": [1.0, 0.0, 0.0]})
    with pytest.raises(DataError, match=r"b \(arc\).*not scored on the same examples"):
        compare_runs(["a", "b"])
    for name, nats in (("a", 2.0), ("b", 3.0)):
        columns = {"id": ["w"], "cluster": ["w"], "nats_sum": [nats], "nats_count": [1.0]}
        write_table(Path(name, "eval/harness-arc.parquet"), columns, ["nats"])
    found = row(compare_runs(["a", "b"]), "harness/arc/nats")
    assert found["change"]["lower_is_better"]
    assert (found["baseline"]["value"], found["now"]["value"]) == (2.0, 3.0)


def test_a_run_that_has_only_harness_tasks(run: Run) -> None:
    run("run.dir=a", "train.steps=1")
    run("run.dir=b", "train.steps=1")
    for name in "ab":
        write_table(
            Path(name, "eval/harness-arc.parquet"), {"id": list("wx"), "cluster": list("wx"), "acc": [1.0, 0.0]}
        )
    write_table(Path("a/eval/harness-more.parquet"), {"id": ["w"], "cluster": ["w"], "acc": [1.0]})
    for file in Path("b/eval").glob("step-*.parquet"):
        file.unlink()
    for runs in (["a", "b"], ["b", "a"]):
        found = compare_runs(runs)
        assert [each["metric"] for each in found["tables"][0]["rows"]] == ["harness/arc/acc"]
        assert "only a was scored on data; harness tasks alone are compared" in found["warnings"]
        assert "only a has run the task more" in found["warnings"]


def test_what_is_damaged_is_named(run: Run) -> None:
    run("run.dir=a", "eval.generate=2")
    for name in ("eval/step-000004.parquet", "eval/examples.parquet", "samples.jsonl", "metrics.jsonl", "config.json"):
        shutil.copytree("a", "b")
        whole = Path("b", name).read_bytes()
        Path("b", name).write_bytes(whole[: len(whole) // 2 + 1])
        with pytest.raises(DataError, match=f"^b/{name} cannot be read"):
            compare_runs(["a", "b"])
        shutil.rmtree("b")
    shutil.copytree("a", "b")
    Path("b/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no run's of posttrain"):
        compare_runs(["a", "b"])


def test_names_and_places(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("run.dir=at@5", "train.steps=1")
    shutil.copytree("at@5", "folder/at@5")
    assert [each["name"] for each in compare_runs(["at@5", "at@5@0"])["runs"]] == ["at@5", "at@5@0"]
    assert [each["name"] for each in compare_runs(["at@5", "folder/at@5"])["runs"]] == ["at@5", "folder/at@5"]
    assert [each["name"] for each in compare_runs(["at@5", "at@5"])["runs"]] == ["at@5 (1)", "at@5 (2)"]
    monkeypatch.chdir("folder/at@5")
    assert [each["name"] for each in compare_runs([".", "../../at@5@0/"[:-1]])["runs"]] == ["at@5", "at@5@0"]
    with pytest.raises(ConfigError, match="at least 100"):
        compare([".", ".", "--resamples", "0"])


def test_other_bins_leave_out_the_calibration_error_alone(run: Run) -> None:
    run("run.dir=a", "train.steps=1")
    run("run.dir=b", "train.steps=1", "eval.bins=10")
    found = compare_runs(["a", "b"])
    names = {each["metric"] for each in found["tables"][0]["rows"]}
    assert "nll" in names
    assert not {"ece", "ece_equal_mass"} & names
    assert any("other eval.bins" in warning for warning in found["warnings"])


def test_records_of_an_earlier_version_have_no_equal_mass_bins(run: Run) -> None:
    run("run.dir=a")
    shutil.copytree("a", "old")
    path = Path("old/eval/step-000004.parquet")
    ids, clusters, records = read_records(path)
    dense = {n: c for n, c in records.items() if not n.startswith("bin_")} | stats.equal_width(records)
    columns = {name: column if column.ndim == 1 else list(column) for name, column in dense.items()}
    write_table(path, {"id": ids, "cluster": clusters, **columns})
    found = compare_runs(["old", "a"])
    assert row(found, "ece")["change"]["value"] == 0
    assert "ece_equal_mass" not in {each["metric"] for each in found["tables"][0]["rows"]}
    assert any("old keeps no fine histogram" in warning for warning in found["warnings"])
    both = compare_runs(["a@0", "a"])
    value = row(both, "ece_equal_mass")["change"]["value"]
    assert value == row(both, "ece_equal_mass")["now"]["value"] - row(both, "ece_equal_mass")["baseline"]["value"]
    assert not both["warnings"] or "fine" not in "".join(both["warnings"])
    assert "ece" in {each["metric"] for each in compare_runs(["old@0", "old"])["tables"][0]["rows"]}


def test_bits_per_byte_has_a_p_of_its_own_for_tokenizers_may_differ(run: Run) -> None:
    run("run.dir=a", "optim.lr=1e-3")
    shutil.copytree("a", "b")
    path = Path("b/eval/step-000004.parquet")
    ids, clusters, records = read_records(path)
    records["tokens"] = records["tokens"] * 2
    columns = {name: column if column.ndim == 1 else list(column) for name, column in records.items()}
    write_table(path, {"id": ids, "cluster": clusters, **columns})
    found = compare_runs(["a", "b"])
    assert row(found, "nll")["p_holm"] < 1e-6
    assert row(found, "bits_per_byte")["p_holm"] == 1.0
    assert any("compare bits_per_byte" in warning for warning in found["warnings"])
