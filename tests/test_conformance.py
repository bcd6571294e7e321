"""Our numbers against other people's code: transformers' own loss, and TRL's SFTTrainer step by step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data import embedded
from posttrain.models.embedded import DIRECTORY
from posttrain.models.load import resolve_path

Run = Callable[..., Any]
LAYOUTS = ["batch.layout=padded", "batch.layout=packed"]


def train_losses(run_dir: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"]["loss"] for line in lines if line["split"] == "train"]


def plain_nll(model: Any, examples: list[tuple[list[int], list[int]]]) -> float:
    """Nats per completion token, one example at a time, from transformers' own logits."""
    total, count = 0.0, 0
    for prompt, completion in examples:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total -= float(logp.gather(-1, torch.tensor(completion)[:, None]).sum())
        count += len(completion)
    return total / count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_0_is_what_transformers_computes(run: Run, layout: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModelForCausalLM.from_pretrained(DIRECTORY)
    rows = embedded.rows("prompt_completion", 40, held_out=True)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    examples = [(ids(row["prompt"]), [*ids(row["completion"]), tokenizer.eos_token_id]) for row in rows]
    summary = run(layout, "train.steps=1")
    assert summary.start["nll"]["value"] == pytest.approx(plain_nll(model, examples), rel=1e-5)


@pytest.mark.long
@pytest.mark.real
def test_step_0_of_a_real_model_is_what_transformers_computes(warm_process: None, smollm2: str, shared: Path) -> None:
    from posttrain.config import resolve
    from posttrain.tools.evaluate import evaluate

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    rows = [json.loads(line) for line in (shared / "gsm8k_test.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(row["question"] + row["answer"]))[:40:20]  # unlike lengths, both short
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = []
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        assert whole[: len(prompt)] == prompt
        examples.append((prompt, whole[len(prompt) :]))
    expected = plain_nll(model, examples)
    columns = ["data.columns.prompt=question", "data.columns.completion=answer", "data.max_length=512"]
    for layout in LAYOUTS:
        arguments = [
            layout,
            f"model.path={smollm2}",
            "data.eval=rows.jsonl",
            *columns,
            "precision=fp32",
            "eval.generate=0",
        ]
        summary = evaluate(resolve([*arguments, "eval.resamples=200", f"run.dir={layout[13:]}"], "eval"))
        assert summary.metrics["nll"]["value"] == pytest.approx(expected, rel=1e-5), layout


def trl_losses(
    model_path: str, rows: list[dict[str, Any]], lr: float, steps: int, max_length: int, batch: int = 8
) -> list[float]:
    """TRL's SFTTrainer, completion only, rows in the order given, constant lr, fp32, no dropout."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    config = SFTConfig(
        output_dir="trl", completion_only_loss=True, per_device_train_batch_size=batch, learning_rate=lr, max_steps=steps,
        lr_scheduler_type="constant", logging_steps=1, max_length=max_length, bf16=False, gradient_checkpointing=False,
        report_to="none", use_cpu=True, save_strategy="no", max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trainer = InOrder(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(model_path)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
def test_the_first_losses_are_those_of_trl(run: Run) -> None:
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in embedded.rows("prompt_completion", 80)]
    theirs = trl_losses(resolve_path("embedded"), rows, lr=3e-4, steps=10, max_length=64)
    assert len(theirs) == 10
    assert max(theirs) / min(theirs) > 1.5  # it did train: the losses are not one number ten times
    for layout in LAYOUTS:
        ours = run(layout, "data.train=embedded:prompt_completion:80", "data.shuffle=false", "schedule=constant",
                   "optim.lr=3e-4", "train.steps=10", f"run.dir={layout[13:]}")  # fmt: skip
        assert train_losses(ours.run_dir) == pytest.approx(theirs, rel=1e-3), layout


@pytest.mark.long
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_checkpoints")
def test_the_first_losses_on_a_real_model_are_those_of_trl(run: Run, shallow_smollm2: str, shared: Path) -> None:
    """Ten steps of two short rows each."""
    rows = json.loads((shared / "alpaca_en_demo.json").read_text())
    rows = sorted(rows, key=lambda row: len(row["instruction"] + row["input"] + row["output"]))[:20]
    Path("rows.json").write_text(json.dumps(rows))
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    chats = [
        {
            "prompt": turn("user", f"{r['instruction']}\n{r['input']}".strip()),
            "completion": turn("assistant", r["output"]),
        }
        for r in rows
    ]
    theirs = trl_losses(shallow_smollm2, chats, lr=2e-5, steps=10, max_length=512, batch=2)
    run(f"model.path={shallow_smollm2}", "data.train=rows.json", "data.eval_fraction=0", "data.shuffle=false",
        "schedule=constant", "data.max_length=512", "optim.lr=2e-5", "train.steps=10", "batch.size=2", "run.dir=ours",
        "data.eval=embedded:prompt_completion:1:held_out")  # fmt: skip
    assert train_losses("ours") == pytest.approx(theirs, rel=1e-3)
    assert len(theirs) == 10
