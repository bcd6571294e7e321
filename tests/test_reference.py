"""The reference: the start or another model, computed once, found again, never recomputed in a step."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_train import assert_same_weights, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import reference, session
from posttrain.data import embedded
from posttrain.data.batches import collate
from posttrain.data.packing import Packing
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ConfigError, ModelError
from posttrain.models.embedded import DIRECTORY
from posttrain.models.policy import Policy
from posttrain.records import read_records

Run = Callable[..., Any]
PAIRS = ["stage=dpo", "data.train=embedded:pairs:80", "data.eval=embedded:pairs:20:held_out", "data.cache=cache"]


def stored() -> list[Path]:
    return sorted(Path("cache").glob("reference-*/logprobs.npy"))


def other_model(directory: str) -> str:
    """The embedded model, moved a little."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(directory)
    return directory


def by_hand(path: Any, row: dict[str, str], answer: str) -> float:
    """log π of an answer and its end, from transformers' own logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    whole = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(logp[i - 1, whole[i]] for i in range(len(prompt), len(whole))))


def test_at_the_start_the_margin_is_exactly_0_and_the_loss_log_2(run: Run) -> None:
    summary = run(*PAIRS, "run.dir=r")
    assert summary.start["margin"]["value"] == 0.0
    assert summary.start["kl"]["value"] == 0.0
    assert summary.start["pair_accuracy"]["value"] == 0.5
    assert summary.start["nll"]["value"] == pytest.approx(np.log(2), abs=1e-12)
    assert losses("r")[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_fresh_adapter_starts_at_its_base(run: Run, adapter: str) -> None:
    summary = run(*PAIRS, f"adapter={adapter}", "run.dir=r")
    assert summary.start["margin"]["value"] == 0.0


def test_a_trained_adapter_is_its_own_reference(run: Run) -> None:
    run(*PAIRS, "adapter=lora", "optim.lr=1e-2", "run.dir=a")
    summary = run(*PAIRS, "adapter=lora", "adapter.path=a/model", "run.dir=b")
    assert summary.start["margin"]["value"] == 0.0
    assert losses("b")[0] == pytest.approx(np.log(2), abs=1e-6)


def test_another_model_as_reference(run: Run) -> None:
    """The margins at the start are those that transformers' logits of both models give."""
    beta, path = 0.3, other_model("other")
    run(*PAIRS, f"model.reference={path}", f"stage.beta={beta}", "run.dir=r", "train.steps=1")
    _, _, records = read_records(Path("r/eval/step-000000.parquet"))
    expected = []
    for row in embedded.rows("pairs", 20, held_out=True):
        gaps = [by_hand(DIRECTORY, row, row[k]) - by_hand(path, row, row[k]) for k in ("chosen", "rejected")]
        expected.append(beta * (gaps[0] - gaps[1]))
    np.testing.assert_allclose(np.sort(records["margin_sum"]), np.sort(expected), atol=1e-4)


def test_it_is_computed_once_and_found_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*PAIRS, "run.dir=a")
    assert len(stored()) == 2  # of the training and of the evaluation data

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "token_logprobs", never)
    run(*PAIRS, "run.dir=b", "optim.lr=2e-4", "stage.beta=0.2")
    with pytest.raises(AssertionError, match="computed again"):
        run(*PAIRS, "run.dir=c", f"model.reference={other_model('other')}")


def test_a_run_goes_on_without_the_cache(run: Run) -> None:
    """What is gone is computed again from the first weights, to the same bits."""
    options = [*PAIRS, "train.steps=6", "train.save_every=3"]
    run(*options, "run.dir=whole")
    run(*options, "run.dir=r")
    shutil.rmtree("r/checkpoints/step-000006")
    for name in ("summary.json", "model"):
        path = Path("r") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree("cache")
    run(*options, "run.dir=r")
    assert losses("r") == losses("whole")
    assert_same_weights("r", "whole", 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_that_is_of_something_else_is_found_out(run: Run, precision: str) -> None:
    """Answers of two or three tokens, half a nat off at each."""
    run(*PAIRS, f"precision={precision}", "run.dir=a")
    for path in stored():
        np.save(path, np.load(path) + np.float32(0.5))
    with pytest.raises(ModelError, match=r"differs from its own stored log-probs.*data\.cache"):
        run(*PAIRS, f"precision={precision}", "run.dir=b")


def test_what_rounding_adds_up_to_over_a_long_response_is_no_mismatch() -> None:
    """4,000 tokens that bf16 rounds by .06 each, to one side a little more often: 4 nats."""
    policy = Policy(AutoModelForCausalLM.from_pretrained(DIRECTORY))
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), precision="bf16", autocast=nullcontext)
    tokens = torch.randint(3, 95, (4000,)).tolist()
    group = TokenGroup("g", "g", [1, 2], [tokens], [[True] * 4000], [4000], [4000], "{}", [1.0])
    batch = collate([group], [[0]], "padded")
    with torch.no_grad():
        logprobs = policy(batch).logprobs
    rounding = 0.06 * torch.tensor([1.0, -1.0] * 2000) + 0.001
    for off, refused in ((rounding, False), (rounding + 0.02, True)):
        group.reference = (logprobs + off).numpy()
        told = pytest.raises(ModelError, match="in a response of 4000 tokens") if refused else nullcontext()
        with told:
            assert reference.check_start(policy, [group], Packing("padded", 8192), runtime) == pytest.approx(4, abs=0.1)


def test_another_vocabulary_is_refused(run: Run) -> None:
    path = other_model("other")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ModelError, match="another vocabulary"):
        run(*PAIRS, f"model.reference={path}", "run.dir=r")


def test_a_reference_that_cannot_be_is_told_before_any_weights_are_loaded(run: Run, monkeypatch: Any) -> None:
    path = other_model("other")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(path)
    run("stage=reward", *PAIRS[1:], "run.dir=scorer", "train.steps=1")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(session, "build_network", never)
    monkeypatch.setattr(session, "prepare_data", never)
    wrong = {
        "./nowhere": "model.reference=./nowhere does not exist",
        path: "another vocabulary",
        "scorer": "reward model",
    }
    for given, told in wrong.items():
        with pytest.raises(ModelError, match=told):
            run(*PAIRS, f"model.reference={given}", "run.dir=r")
    with pytest.raises(ConfigError, match="has no reference"):
        run("model.reference=embedded", "run.dir=r")


def test_an_adapter_as_reference_is_its_base_with_it(run: Run) -> None:
    """The margins at the start are minus those that the adapter's run ended with, from its base as reference."""
    run(*PAIRS, "adapter=lora", "optim.lr=1e-2", "run.dir=a")
    run(*PAIRS, "model.reference=a", "run.dir=b", "train.steps=1")
    ended, began = (
        dict(zip(ids, records["margin_sum"], strict=True))
        for ids, _, records in (
            read_records(Path(f"{name}.parquet")) for name in ("a/eval/step-000004", "b/eval/step-000000")
        )
    )
    assert max(map(abs, ended.values())) > 0.1
    assert {name: -value for name, value in began.items()} == pytest.approx(ended, abs=1e-4)


def test_a_stage_without_a_reference_refuses_one(run: Run) -> None:
    with pytest.raises(ConfigError, match="has no reference"):
        run("model.reference=embedded", "run.dir=r")


def test_what_needs_no_reference_to_train_has_one_for_evaluation_alone(run: Run) -> None:
    run(*PAIRS, "stage.reference_free=true", "run.dir=r")
    assert len(stored()) == 1


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_each_token_finds_its_own(run: Run, layout: str) -> None:
    """Groups of unlike lengths and numbers of responses, in every layout: the policy's log-probs less the stored are 0."""
    rows = embedded.rows("groups", 30)
    for i, row in enumerate(rows):
        row["responses"] = row["responses"][: 2 + i % 3]
        row["rewards"] = [1.0, 0.0, 0.0, 0.0][: 2 + i % 3]
    import json

    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run("stage=gpro", "stage.form=dual", "data.train=g.jsonl", "data.eval=g.jsonl", "data.cache=cache",
                  f"batch.layout={layout}", "batch.micro_tokens=64", "run.dir=r", "optim.lr=1e-9")  # fmt: skip
    assert summary.start["kl"]["value"] == 0.0
    _, _, records = read_records(Path("r/eval/step-000004.parquet"))
    assert np.abs(records["margin_sum"]).max() < 1e-4
