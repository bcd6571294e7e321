"""One measurement of fine-tuning, ours or TRL's, in a process of its own: prints a line of JSON.

    python tests/benchmarks/sft.py --peer posttrain --model DIR --data alpaca.json --steps 5 --layout padded --adapter none

Both train the same rows in the same order, bf16 autocast over fp32 weights, batch 8, max_length 512, AdamW, constant rate.
The first step warms up and is not timed. trained tokens: completion tokens; peak memory: the process's largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LR = 2e-5


def main() -> None:
    options = parser().parse_args()
    rows = json.loads(Path(options.data).read_text(encoding="utf-8"))[: options.rows]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["XDG_CACHE_HOME"] = scratch
        result = {"posttrain": ours, "trl": trl}[options.peer](options, rows)
    result["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    json.dump({"peer": options.peer, "layout": options.layout, "adapter": options.adapter, **result}, sys.stdout)
    print()


def ours(options: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    from posttrain import run

    Path("rows.json").write_text(json.dumps(rows))
    began = time.monotonic()
    sys.stdout, said = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
    overrides = [
        f"model.path={options.model}", "data.train=rows.json", "data.eval_fraction=0", "data.shuffle=false",
        "data.max_length=512",
        "batch.size=8", f"batch.layout={options.layout}", f"adapter={options.adapter}", "precision=bf16", "schedule=constant",
        f"optim.lr={LR}", f"train.steps={options.steps}", "train.log_every=1", "eval.generate=0", "run.dir=r",
        "data.max_lost_fraction=1",
    ]  # fmt: skip
    summary = run(overrides)
    sys.stdout = said
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    lines = [line["metrics"] for line in lines if line["split"] == "train"]
    timed = lines[-1]["trained_tokens"] - lines[0]["trained_tokens"]
    all_tokens = lines[-1]["tokens"] - lines[0]["tokens"]
    seconds = all_tokens / lines[-1]["tokens_per_second"]
    del summary
    return {
        "losses": [line["loss"] for line in lines],
        "trained_tokens_per_second": timed / seconds,
        "tokens_per_second": all_tokens / seconds,
        "whole_seconds": time.monotonic() - began,
    }


def trl(options: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    began = time.monotonic()

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.monotonic())

    def chat(row: dict[str, str]) -> dict[str, Any]:
        prompt = f"{row['instruction']}\n{row['input']}".strip()
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chats = [c for c in map(chat, rows) if fits(tokenizer, c)]
    lora = None
    if options.adapter == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = SFTConfig(
        output_dir="trl", completion_only_loss=True, per_device_train_batch_size=8, learning_rate=LR, max_steps=options.steps,
        lr_scheduler_type="constant", logging_steps=1, max_length=512, bf16=True, gradient_checkpointing=False,
        report_to="none", use_cpu=True, save_strategy="no", max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
        packing=options.layout == "packed",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    clock = Clock()
    trainer = InOrder(
        model,
        config,
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=lora,
    )
    trained = [sum(label != -100 for label in row) for row in trainer.train_dataset[: 8 * options.steps]["labels"]]
    lengths = [len(ids) for ids in trainer.train_dataset[: 8 * options.steps]["input_ids"]]
    sys.stdout, said = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
    trainer.train()
    sys.stdout = said
    seconds = clock.times[-1] - clock.times[0]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trained_tokens_per_second": sum(trained[8:]) / seconds,
        "tokens_per_second": sum(lengths[8:]) / seconds,
        "whole_seconds": time.monotonic() - began,
    }


def fits(tokenizer: Any, chat: dict[str, Any]) -> bool:
    """TRL would cut what is too long; posttrain drops it. Both get the rows that fit."""
    whole = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_dict=False)
    return len(whole) <= 512


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["posttrain", "trl"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layout", choices=["padded", "packed"], default="padded")
    parser.add_argument("--adapter", choices=["none", "lora"], default="none")
    return parser


if __name__ == "__main__":
    main()
