"""Preference stages against TRL, and the shared layout against our own padded one, as ratios in RESULTS.md.

    make bench-preferences BENCH="--model DIR --pairs dpo_en_demo.json --groups gsm8k_groups.jsonl"

Each measurement is a process of its own, the sides by turns. The losses of both sides agree at every step, to 2 % and what
bf16's rounding explains, or nothing is written (tests/test_conformance_preferences.py compares them in fp32). Timed are
optimizer steps: neither side's time of computing the reference beforehand is in it.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from sides import Bench, Found

BATCH, MAX_LENGTH, LR, BETA = 8, 512, 1e-6, 0.1
ROUNDING = 0.05
"""Standard deviation in nats of a token's log-prob between two batches that it stands in, in bf16 on this model: measured
.043. A reference computed beforehand was in another batch than the step's policy; TRL's, where it comes with the step, in
the same one."""
NAMES = {"human": "user", "gpt": "assistant", "system": "system"}


def ours(options: Any, *overrides: str) -> Found:
    """A run of ours: losses and groups per second."""
    from posttrain import run

    run([
        f"model.path={options.model}", "data.eval_fraction=0", "data.shuffle=false", f"data.max_length={MAX_LENGTH}",
        "data.max_lost_fraction=1", f"batch.size={BATCH}", "precision=bf16", "schedule=constant", f"optim.lr={LR}",
        f"train.steps={options.steps}", f"train.save_every={options.steps}", "train.log_every=1", "eval.generate=0",
        "run.dir=r", f"data.train_limit={BATCH * options.steps}", *overrides,
    ])  # fmt: skip
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    seconds = lines[-1]["time_s"] - lines[0]["time_s"]
    losses, trained = ([line["metrics"][name] for line in lines] for name in ("loss", "trained_tokens"))
    tokens = [after - before for before, after in pairwise([0, *trained])]
    return {"losses": losses, "tokens": tokens, "per_second": BATCH * (options.steps - 1) / seconds}


def chats(options: Any) -> list[Found]:
    """The pairs that fit, as TRL reads them; it would cut the others, and posttrain drops them."""
    from transformers import AutoTokenizer

    turn = lambda m: {"role": NAMES[m["from"]], "content": m["value"]}  # noqa: E731
    rows = [
        {
            "prompt": list(map(turn, r["conversations"])),
            "chosen": [turn(r["chosen"])],
            "rejected": [turn(r["rejected"])],
        }
        for r in json.loads(Path(options.pairs).read_text(encoding="utf-8"))[:300]
    ]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    length = lambda turns: len(tokenizer.apply_chat_template(turns, return_dict=False))  # noqa: E731
    fits = lambda r: max(length(r["prompt"] + r["chosen"]), length(r["prompt"] + r["rejected"])) <= MAX_LENGTH  # noqa: E731
    return [row for row in rows if fits(row)][: BATCH * options.steps]


def theirs(options: Any, kind: str, **settings: Any) -> Found:
    """A TRL trainer: losses and pairs per second."""
    import torch
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.monotonic())

    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")

    class InOrder(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if kind == "Reward":
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=1, dtype=torch.float32
        )
        torch.nn.init.zeros_(model.score.weight)  # as ours begins
        tokenizer.pad_token = "<empty_output>"
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    config = config_class(
        output_dir="trl", per_device_train_batch_size=BATCH, learning_rate=LR, max_steps=options.steps, bf16=True,
        lr_scheduler_type="constant", logging_steps=1, max_length=MAX_LENGTH, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(chats(options)), processing_class=tokenizer
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "per_second": BATCH * (options.steps - 1) / (clock.times[-1] - clock.times[0])}


def of_pairs(options: Any, stage: str) -> Found:
    return ours(options, f"stage={stage}", f"data.train={options.pairs}")


def of_groups(options: Any, layout: str, shots: int) -> Found:
    """Each question after `shots` others that are answered, as such benchmarks are asked."""
    rows = [json.loads(line) for line in Path(options.groups).read_text(encoding="utf-8").splitlines()]
    solved = [(row["prompt"], row["responses"][row["rewards"].index(1)]) for row in rows if 1 in row["rewards"]]
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in solved[-shots:] if shots)
    asked = [row | {"prompt": examples + row["prompt"]} for row in rows]
    Path("groups.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return ours(options, "stage=gpro", "data.train=groups.jsonl", f"batch.layout={layout}", "data.max_length=2560")


def check_equal(ours: Found, other: Found) -> None:
    """SystemExit unless the losses agree to 2 % and three standard deviations of what rounding T tokens a step adds to a mean
    of BATCH terms whose slope in a log-prob is at most BETA / 2."""
    for a, b, tokens in zip(ours["losses"], other["losses"], ours["tokens"], strict=True):
        if abs(a - b) > 0.02 * abs(b) + 3 * BETA / 2 * ROUNDING * tokens**0.5 / BATCH:
            raise SystemExit(f"the losses differ, so nothing can be compared:\n{ours['losses']}\n{other['losses']}")


CASES = {  # name: (the first side, the second side)
    "dpo, TRL as it comes": (lambda o: of_pairs(o, "dpo"), lambda o: theirs(o, "DPO")),
    "dpo, TRL's reference precomputed": (
        lambda o: of_pairs(o, "dpo"),
        lambda o: theirs(o, "DPO", precompute_ref_log_probs=True),
    ),
    "reward": (lambda o: of_pairs(o, "reward"), lambda o: theirs(o, "Reward")),
    "groups of 4, shared against our padded": (
        lambda o: of_groups(o, "shared", 0),
        lambda o: of_groups(o, "padded", 0),
    ),
    "the same after eight worked examples": (lambda o: of_groups(o, "shared", 8), lambda o: of_groups(o, "padded", 8)),
}


def said(options: Any) -> list[str]:
    return [
        f"Batch {BATCH}, max_length {MAX_LENGTH}, {options.steps - 1} timed steps. Losses agree at every step to 2 % and what",
        "bf16's rounding explains. Pairs or groups per second; computing the reference beforehand is not timed on either side.",
    ]


if __name__ == "__main__":
    inputs = ("model", "pairs", "groups")
    Bench(__file__, "preferences", "Preference stages", inputs, CASES, said, check_equal).main(__doc__)
