"""`posttrain chat RUN|MODEL`: talk to a model; off a terminal, each line of standard input is a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from posttrain import stats
from posttrain.calibration import FILE, read_temperature
from posttrain.errors import ConfigError, ModelError
from posttrain.models.lineage import is_reward_model, resolve_path
from posttrain.models.reload import load_saved


def chat(argv: list[str]) -> None:
    """Reads prompts until end of input or /quit; /new starts a new conversation."""
    options = _parser().parse_args(argv)
    if is_reward_model(resolve_path(options.model)):
        raise ModelError(f"{options.model} is a reward model: it scores answers and writes none; give a policy")
    fitted = fitted_temperature(options.model)
    if options.temperature is None:
        options.temperature = required(fitted, options.model)
    model, tokenizer = load_saved(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    torch.manual_seed(options.seed)
    interactive = sys.stdin.isatty()
    history: list[dict[str, str]] = []
    if interactive:
        kind = "its chat template" if tokenizer.chat_template else "no chat template: the prompt is continued as it is"
        print(f"{options.model} ({kind}; temperature {options.temperature:g}, seed {options.seed}). /new, /quit")
        if fitted is not None:
            print(f"at temperature {fitted} its probabilities fit held-out text best: --temperature fitted")
    for line in _lines(interactive):
        if line == "/quit":
            break
        if line == "/new" or not interactive:
            history = []
        if line == "/new":
            continue
        history.append({"role": "user", "content": line})
        answer = _answer(model, tokenizer, history, options, device)
        history.append({"role": "assistant", "content": answer})


def fitted_temperature(model: str) -> stats.Estimate | None:
    """What the run that trained this model has found for its tokens, if it has."""
    found = read_temperature(Path(resolve_path(model)))
    return stats.Estimate(**found["temperature"]) if found and found["of"] == "tokens" else None


def required(fitted: stats.Estimate | None, model: str) -> float:
    """ConfigError where none was fitted."""
    if fitted is None or fitted.value is None:
        raise ConfigError(
            f"--temperature fitted: no temperature was fitted to the tokens of {model} (its {FILE}); sft and pretrain fit one on "
            "their evaluation data; give a number"
        )
    return fitted.value


def _lines(interactive: bool) -> Any:
    """Prompts, without their line ends."""
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            return
        if not line and not interactive:
            return
        if line.strip():
            yield line.rstrip("\n")


def _answer(model: Any, tokenizer: Any, history: list[dict[str, str]], options: Any, device: str) -> str:
    """Generate, printing as it goes."""
    if tokenizer.chat_template:
        system = [{"role": "system", "content": options.system}] if options.system else []
        text = tokenizer.apply_chat_template(system + history, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
    else:
        from posttrain.data.tokenize import beginning

        ids = beginning(tokenizer) + tokenizer(history[-1]["content"], add_special_tokens=False)["input_ids"]
        inputs = {"input_ids": torch.tensor([ids], device=device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    own = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampling if options.temperature > 0 else {"do_sample": False}),
    )
    streamer: TextStreamer | TextIteratorStreamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, generation_config=settings, streamer=streamer)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _temperature(text: str) -> float | None:
    return None if text == "fitted" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain chat", description="Talk to a run, a model directory or a hub id.")
    parser.add_argument("model", help="a run directory, a model directory, an adapter, or a hub id")
    parser.add_argument("--system", help="a system prompt")
    told = "0 is greedy; fitted: the model's own (default: %(default)s)"
    parser.add_argument("--temperature", type=_temperature, default=0.7, help=told)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser
