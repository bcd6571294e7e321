"""The preference stages step by step against TRL's DPOTrainer and RewardTrainer, from the same weights on the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.data import embedded
from posttrain.models.load import resolve_path

Run = Callable[..., Any]
STEPS, BATCH = 10, 8
COMMON: dict[str, Any] = {
    "output_dir": "trl", "per_device_train_batch_size": BATCH, "max_steps": STEPS, "lr_scheduler_type": "constant",
    "logging_steps": 1, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "use_cpu": True,
    "save_strategy": "no", "max_grad_norm": 1.0, "weight_decay": 0.0, "disable_tqdm": True,
}  # fmt: skip


def train_log(run_dir: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if line["split"] == "train"]


def trl_log(trainer_class: Any, config: Any, model: Any, tokenizer: Any, rows: list[Any]) -> list[dict[str, float]]:
    """What TRL logs each step, rows in the order given."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def pairs(count: int) -> list[dict[str, str]]:
    return [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in embedded.rows("pairs", count)]


OURS = ["data.shuffle=false", "schedule=constant", f"train.steps={STEPS}", f"batch.size={BATCH}"]
EMBEDDED = ["data.train=embedded:pairs:80", "data.eval=embedded:pairs:20:held_out"]


def dpo_of_trl(path: str, rows: list[Any], lr: float, **settings: Any) -> list[dict[str, float]]:
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = DPOConfig(**COMMON | settings, learning_rate=lr, max_length=512)
    return trl_log(DPOTrainer, config, model, tokenizer, rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({"loss_type": "sigmoid"}, []), ({"loss_type": "hinge"}, ["stage.link=hinge"]),
     ({"loss_type": "robust", "label_smoothing": 0.1}, ["stage.link=robust", "stage.flip_probability=0.1"])],
    ids=["logistic", "hinge", "robust"],
)  # fmt: skip
def test_dpo_losses_are_those_of_trl(run: Run, theirs: dict[str, Any], ours: list[str]) -> None:
    expected = dpo_of_trl(resolve_path("embedded"), pairs(80), 1e-4, beta=0.3, **theirs)
    for layout in ("padded", "shared"):
        options = [*EMBEDDED, *OURS, *ours, "optim.lr=1e-4", f"batch.layout={layout}", f"run.dir={layout}"]
        run("stage=dpo", "stage.beta=0.3", *options)
        found = train_log(layout)
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3), layout
        assert found[0]["pair_accuracy"] == 0.5  # TRL reads 0 here: there a tie is a loss
        margins = [line["margin"] for line in found[1:]]
        assert margins == pytest.approx([line["rewards/margins"] for line in expected[1:]], abs=2e-3), layout
        accuracies = [line["pair_accuracy"] for line in found[1:]]
        assert accuracies == pytest.approx([line["rewards/accuracies"] for line in expected[1:]], abs=1e-6), layout


def scored(path: str, out: str, pad: str | None = None) -> None:
    """A sequence classifier with a random score layer, for both sides to begin from."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if pad:
        tokenizer.pad_token = pad
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def reward_of_trl(path: str, rows: list[Any], lr: float, **settings: Any) -> list[dict[str, float]]:
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    config = RewardConfig(**COMMON | settings, learning_rate=lr, max_length=512)
    return trl_log(RewardTrainer, config, model, tokenizer, rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("centering", [0.0, 0.1])
def test_reward_losses_and_accuracies_are_those_of_trl(run: Run, centering: float) -> None:
    scored(resolve_path("embedded"), "start")
    settings = {"center_rewards_coefficient": centering} if centering else {}
    expected = reward_of_trl("start", pairs(80), 1e-3, **settings)
    run(
        "stage=reward",
        "model.path=start",
        *EMBEDDED,
        *OURS,
        "optim.lr=1e-3",
        f"stage.centering={centering}",
        "run.dir=r",
    )
    found = train_log("r")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    accuracies = [line["pair_accuracy"] for line in found]
    assert accuracies == pytest.approx([line["accuracy"] for line in expected], abs=1e-6)


def chats(shared: Path, path: str, count: int) -> list[dict[str, Any]]:
    """The rows of dpo_en_demo with the fewest tokens, also as TRL reads them."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = json.loads((shared / "dpo_en_demo.json").read_text())
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    turn = lambda message: {"role": names[message["from"]], "content": message["value"]}  # noqa: E731
    made = [
        {
            "prompt": [turn(m) for m in row["conversations"]],
            "chosen": [turn(row["chosen"])],
            "rejected": [turn(row["rejected"])],
        }
        for row in rows
    ]
    tokens = [
        sum(len(tokenizer.apply_chat_template(chat["prompt"] + chat[side], return_dict=False)) for side in SIDES)
        for chat in made
    ]
    short = sorted(range(len(rows)), key=tokens.__getitem__)[:count]
    Path("rows.json").write_text(json.dumps([rows[i] for i in short]))
    return [made[i] for i in short]


SIDES = ("chosen", "rejected")
FEW = {"per_device_train_batch_size": 2, "max_steps": 3}
"""TRL holds whole logits of a real vocabulary; ten steps are compared on the embedded model."""
REAL = [*OURS, "batch.size=2", "train.steps=3", "data.train=rows.json", "data.eval_fraction=0",
        "data.eval=embedded:pairs:1:held_out", "data.max_length=512", "optim.lr=1e-5"]  # fmt: skip


@pytest.mark.long
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_checkpoints")
def test_dpo_losses_on_a_real_model_are_those_of_trl(run: Run, shallow_smollm2: str, shared: Path) -> None:
    expected = dpo_of_trl(shallow_smollm2, chats(shared, shallow_smollm2, 6), 1e-5, **FEW)
    run("stage=dpo", f"model.path={shallow_smollm2}", *REAL, "run.dir=r")
    found = train_log("r")
    assert len(expected) == 3
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3)


@pytest.mark.long
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_checkpoints")
def test_reward_losses_on_a_real_model_are_those_of_trl(run: Run, shallow_smollm2: str, shared: Path) -> None:
    scored(shallow_smollm2, "start", pad="<empty_output>")
    expected = reward_of_trl("start", chats(shared, shallow_smollm2, 6), 1e-5, **FEW)
    run("stage=reward", "model.path=start", *REAL, "run.dir=r")
    found = train_log("r")
    assert len(expected) == 3
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
