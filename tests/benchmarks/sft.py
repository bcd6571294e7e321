"""Fine-tuning, ours or TRL's: one measurement in a process of its own, as a line of JSON.

python tests/benchmarks/sft.py --peer posttrain --model DIR --data alpaca.json --steps 5 --layout padded --adapter none
"""

from __future__ import annotations

import time
from typing import Any

from measure import MAX_LENGTH, Found, Rows, main, posttrain_steps, posttrain_tokenisation, trl_arguments, trl_steps

TITLE = "Fine-tuning against TRL's SFTTrainer"
CASES = [("padded", "none"), ("packed", "none"), ("padded", "lora"), ("packed", "lora")]


def ours(options: Any, rows: Rows) -> Found:
    return posttrain_steps(options, rows, ["stage=sft"]) if options.steps else posttrain_tokenisation(options, rows)


def trl(options: Any, rows: Rows) -> Found:
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        seconds = 0.0

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            InOrder.seconds += time.perf_counter() - began
            return prepared

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    arguments = trl_arguments(options)
    if options.steps:
        chats = [c for c in map(chat, rows[: options.rows]) if fits(tokenizer, c)]
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        chats = [chat(row) for row in rows]  # only their tokens are asked for: any model will do
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model, num_hidden_layers=1))
        arguments["max_steps"] = 1
    lora = None
    if options.adapter == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = SFTConfig(completion_only_loss=True, packing=options.layout == "packed", **arguments)
    dataset = Dataset.from_list(chats)
    trainer = InOrder(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    if not options.steps:
        return {"rows_per_second": len(chats) / InOrder.seconds}
    labels = trainer.train_dataset[: config.per_device_train_batch_size * options.steps]["labels"]
    return trl_steps(trainer, [sum(label != -100 for label in row) for row in labels])


def chat(row: dict[str, str]) -> dict[str, Any]:
    prompt = f"{row['instruction']}\n{row['input']}".strip()
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def fits(tokenizer: Any, chat: dict[str, Any]) -> bool:
    """TRL would cut what is too long; posttrain drops it. Both get the rows that fit."""
    whole = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_dict=False)
    return len(whole) <= MAX_LENGTH


if __name__ == "__main__":
    main(__doc__, {"posttrain": ours, "trl": trl})
