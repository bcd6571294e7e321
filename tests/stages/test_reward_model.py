"""A trained reward model is one that others load: transformers' classes and pipeline, peft, our own loader; the same scores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from posttrain.data import embedded
from posttrain.errors import ModelError
from posttrain.models.embedded import DIRECTORY
from posttrain.models.reload import load_saved
from posttrain.records import read_records
from posttrain.tools.chat import chat
from posttrain.tools.merge import merge

Run = Callable[..., Any]
ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
PAIRS = ["stage=reward", "data.train=embedded:pairs:200", "data.eval=embedded:pairs:40:held_out", "optim.lr=1e-3"]


def our_scores(run_dir: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Of chosen and rejected, in the order of the embedded rows' ids."""
    _, _, records = read_records(Path(run_dir) / "eval" / f"step-{step:06d}.parquet")
    return np.sort(records["reward_chosen_sum"]), np.sort(records["reward_rejected_sum"])


def texts(key: str) -> list[str]:
    """As the run rendered them: no chat template, the end of text appended."""
    return [f"{row['prompt']}{row[key]}<eos>" for row in embedded.rows("pairs", 40, held_out=True)]


def scores_of(model: Any, tokenizer: Any, lines: list[str]) -> np.ndarray:
    """All in one padded batch."""
    rows = tokenizer(lines, padding=True, add_special_tokens=False, return_tensors="pt")
    rows.pop("token_type_ids", None)
    with torch.no_grad():
        return np.sort(model.eval()(**rows).logits.squeeze(-1).double().numpy())


def test_transformers_gives_our_scores(run: Run) -> None:
    run(*PAIRS, "run.dir=r")
    chosen, rejected = our_scores("r", 4)
    assert chosen.std() > 1e-3  # it scores something
    model, tokenizer = (c.from_pretrained("r/model") for c in (AutoModelForSequenceClassification, AutoTokenizer))
    np.testing.assert_allclose(scores_of(model, tokenizer, texts("chosen")), chosen, atol=1e-5)
    np.testing.assert_allclose(scores_of(model, tokenizer, texts("rejected")), rejected, atol=1e-5)
    classify = pipeline("text-classification", model="r/model", function_to_apply="none")
    found = np.sort([each["score"] for each in classify(texts("chosen"), batch_size=8)])
    np.testing.assert_allclose(found, chosen, atol=1e-5)


def test_the_head_is_saved_with_the_adapter(run: Run) -> None:
    run(*PAIRS, "adapter=lora", "optim.lr=1e-2", "run.dir=r")
    chosen, _ = our_scores("r", 4)
    assert chosen.std() > 1e-3
    loaded, tokenizer = load_saved("r", torch.float32)
    np.testing.assert_allclose(scores_of(loaded, tokenizer, texts("chosen")), chosen, atol=1e-5)
    merge(["r", "merged"])
    whole, tokenizer = load_saved("merged")
    assert type(whole).__name__ == "LlamaForSequenceClassification"
    np.testing.assert_allclose(scores_of(whole, tokenizer, texts("chosen")), chosen, atol=1e-4)


def test_the_head_is_saved_with_a_4_bit_adapter(run: Run) -> None:
    """peft alone puts it back together, on a base quantised as it was trained."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    run(*PAIRS, "adapter=qlora", "optim.lr=1e-2", "run.dir=r")
    chosen, _ = our_scores("r", 4)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForSequenceClassification.from_pretrained(DIRECTORY, num_labels=1, quantization_config=four_bits)
    tokenizer = AutoTokenizer.from_pretrained("r/model")
    base.config.pad_token_id = tokenizer.pad_token_id
    found = scores_of(PeftModel.from_pretrained(base, "r/model"), tokenizer, texts("chosen"))
    np.testing.assert_allclose(found, chosen, atol=0.05)  # its kernel on this processor is another


def test_training_goes_on_from_a_reward_model(run: Run) -> None:
    """The score layer is read back, not begun anew: the second run starts where the first ended."""
    first = run(*PAIRS, "run.dir=a")
    second = run(*PAIRS, "model.path=a", "run.dir=b")
    assert second.start["nll"]["value"] == pytest.approx(first.metrics["nll"]["value"], rel=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "special"])
def test_other_poolings_say_so(run: Run, pooling: str) -> None:
    run(*PAIRS, f"stage.pooling={pooling}", "run.dir=r")
    assert json.loads(Path("r/model/config.json").read_text())["posttrain_pooling"] == pooling
    with pytest.raises(ModelError, match=rf"set stage\.pooling={pooling}"):
        run(*PAIRS, "model.path=r", "run.dir=s")


def test_an_adapter_of_a_language_model_is_no_reward_model(run: Run) -> None:
    run("adapter=lora", "run.dir=a", "optim.lr=1e-3")
    with pytest.raises(ModelError, match=r"give it as model\.path=a/model"):
        run(*PAIRS, "adapter=lora", "adapter.path=a/model", "run.dir=b")


def test_pad_is_a_token_of_no_text(run: Run) -> None:
    run(*PAIRS, "run.dir=r", "train.steps=1")
    tokenizer = AutoTokenizer.from_pretrained("r/model")
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, AutoTokenizer.from_pretrained(DIRECTORY).bos_token_id)


def test_a_tokenizer_without_a_token_to_pad_with_is_told_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As gpt2's, whose one special token ends texts: what is saved scores one text at a time."""
    shutil.copytree(DIRECTORY, "m")
    for name, change in {
        "tokenizer_config.json": {"pad_token": None, "unk_token": "<eos>"},
        "tokenizer.json": {"added_tokens": [{"id": 1, "content": "<eos>", **ADDED}]},
        "config.json": {"pad_token_id": None},
    }.items():
        file = Path("m") / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    run(*PAIRS, "model.path=m", "run.dir=r")
    told = " ".join(capsys.readouterr().out.split())
    assert "no special token to spare for padding" in told
    assert "one text at a time" in told
    model, saved = (c.from_pretrained("r/model") for c in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.pad_token_id is None
    chosen, _ = our_scores("r", 4)
    ids = [saved(line, add_special_tokens=False, return_tensors="pt")["input_ids"] for line in texts("chosen")]
    with torch.no_grad():
        found = np.sort([float(model.eval()(row).logits) for row in ids])
    np.testing.assert_allclose(found, chosen, atol=1e-5)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        model(torch.tensor([[5, 6], [7, 8]]))


def test_a_reward_model_does_not_chat(run: Run) -> None:
    run(*PAIRS, "run.dir=r", "train.steps=1")
    with pytest.raises(ModelError, match="reward model"):
        chat(["r"])


@pytest.mark.long
@pytest.mark.real
@pytest.mark.usefixtures("no_checkpoints")
def test_a_real_reward_model_reloads_with_the_same_scores(run: Run, shallow_smollm2: str, shared: Path) -> None:
    """SmolLM2 pads with its end-of-turn token; its reward model must not."""
    rows = sorted((shared / "gsm8k_pairs.jsonl").read_text().splitlines(), key=len)[:12]
    Path("rows.jsonl").write_text("\n".join(rows))
    run("stage=reward", f"model.path={shallow_smollm2}", "data.train=rows.jsonl", "data.eval=rows.jsonl",
        "data.max_length=512", "batch.size=4", "train.steps=3", "optim.lr=1e-2", "run.dir=r")  # fmt: skip
    chosen, _ = our_scores("r", 3)
    assert chosen.std() > 0.1
    model, tokenizer = load_saved("r", torch.float32)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    given = [json.loads(row) for row in rows]
    lines = [
        tokenizer.apply_chat_template([turn("user", r["prompt"]), turn("assistant", r["chosen"])], tokenize=False)
        for r in given
    ]
    np.testing.assert_allclose(scores_of(model, tokenizer, lines), chosen, atol=2e-2)  # a base in bf16 is saved in bf16
