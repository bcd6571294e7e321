"""Rollouts against the library's generate, and a whole iteration of group advantages against TRL's GRPOTrainer.

    make bench-rollouts BENCH="--model DIR --prompts gsm8k_test.jsonl"

Each measurement is a process of its own, the sides by turns. Both sides answer the same prompts with the same settings, bf16
autocast over fp32 weights. Tokens are those of the answers, up to and with the end token.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from sides import Bench, Found

PROMPTS, ROWS, ROOM = 64, 16, 192
"""Of the rollout: prompts, how many the library answers at a time, and the longest answer in tokens."""
SAMPLES, ASKED, LONGEST, LR = 4, 4, 64, 1e-6
"""Of an iteration: answers to a prompt, prompts, the longest answer, and the rate."""


def questions(options: Any, count: int) -> list[str]:
    return [json.loads(line)["question"] for line in Path(options.prompts).read_text().splitlines()[:count]]


def policy_and_prompts(options: Any) -> tuple[Any, Any, list[list[int]], int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": question}] for question in questions(options, PROMPTS)]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return model, tokenizer, prompts, tokenizer.convert_tokens_to_ids("<|im_end|>")


def our_rollout(options: Any) -> Found:
    import torch

    from posttrain.allocator import keep_freed_memory
    from posttrain.models.policy import Policy
    from posttrain.rollout import generate
    from posttrain.sampling import Sampling

    keep_freed_memory()
    model, tokenizer, prompts, end = policy_and_prompts(options)
    policy = Policy(model)
    with torch.autocast("cpu", torch.bfloat16):
        generate(policy, prompts[:2], {end}, tokenizer.pad_token_id, 4, sampling=Sampling(1.0))
        began = time.perf_counter()
        answers = generate(policy, prompts, {end}, tokenizer.pad_token_id, ROOM, sampling=Sampling(1.0, seed=1))
        seconds = time.perf_counter() - began
    return {"per_second": sum(len(answer.logprobs) for answer in answers) / seconds}


def library_rollout(options: Any) -> Found:
    import torch

    model, tokenizer, prompts, end = policy_and_prompts(options)
    tokenizer.padding_side = "left"
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": end}
    count = 0
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.generate(torch.tensor([prompts[0]]), max_new_tokens=4, **settings)
        began = time.perf_counter()
        for start in range(0, PROMPTS, ROWS):
            batch = tokenizer.pad({"input_ids": prompts[start : start + ROWS]}, return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=ROOM, pad_token_id=tokenizer.pad_token_id, **settings)
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                count += row.index(end) + 1 if end in row else len(row)
        seconds = time.perf_counter() - began
    return {"per_second": count / seconds}


def our_iteration(options: Any) -> Found:
    from posttrain import run

    rows = [json.dumps({"prompt": question}) for question in questions(options, ASKED * options.steps)]
    Path("prompts.jsonl").write_text("\n".join(rows))
    Path("rewarding.py").write_text(
        "def short(prompts, responses, rows):\n    return [-len(r) / 100 for r in responses]\n"
    )
    run([
        "stage=grpo", f"model.path={options.model}", "data.train=prompts.jsonl", "data.eval_fraction=0", "data.shuffle=false",
        "data.max_length=512", "stage.rewards=[rewarding:short]", f"stage.samples={SAMPLES}", f"batch.size={ASKED}",
        f"stage.max_new_tokens={LONGEST}", "stage.epochs=1", "precision=bf16", "schedule=constant", f"optim.lr={LR}",
        f"train.steps={options.steps}", f"train.save_every={options.steps}", "train.log_every=1", "run.dir=r", "stage.beta=0.04",
    ])  # fmt: skip
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    seconds = lines[-1]["time_s"] - lines[0]["time_s"]
    tokens = statistics.mean(line["metrics"]["response_tokens"] for line in lines)
    return {"per_second": ASKED * SAMPLES * (options.steps - 1) / seconds, "tokens": tokens}


def trl_iteration(options: Any) -> Found:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.monotonic())

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [-len(completion[0]["content"]) / 100 for completion in completions]

    chats = [[{"role": "user", "content": question}] for question in questions(options, ASKED * options.steps)]
    config = GRPOConfig(
        output_dir="trl", per_device_train_batch_size=ASKED * SAMPLES, num_generations=SAMPLES, learning_rate=LR, bf16=True,
        max_steps=options.steps, max_completion_length=LONGEST, temperature=1.0, beta=0.04, lr_scheduler_type="constant",
        logging_steps=1, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), reward_funcs=reward, args=config,
        train_dataset=Dataset.from_dict({"prompt": chats}),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
    )  # fmt: skip
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    told = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    seconds = clock.times[-1] - clock.times[0]
    return {"per_second": ASKED * SAMPLES * (options.steps - 1) / seconds, "tokens": statistics.mean(told)}


CASES = {  # tokens, then samples per second
    f"rollout of {PROMPTS} prompts, the library's generate {ROWS} at a time": (our_rollout, library_rollout),
    f"iteration of {ASKED} prompts, {SAMPLES} answers each, TRL's GRPOTrainer": (our_iteration, trl_iteration),
}


def said(options: Any) -> list[str]:
    return [
        f"Temperature 1; rollout: tokens per second, answers of at most {ROOM} tokens; iteration: samples per second, at most",
        f"{LONGEST} tokens, {options.steps - 1} timed iterations.",
    ]


if __name__ == "__main__":
    Bench(__file__, "rollouts", "Rollouts", ("model", "prompts"), CASES, said).main(__doc__)
