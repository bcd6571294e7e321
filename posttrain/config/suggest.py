"""The key a user most likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

OTHER_TOOLS = {
    "learning_rate": "optim.lr",
    "batch_size": "batch.size",
    "per_device_train_batch_size": "batch.micro_size",
    "micro_batch_size": "batch.micro_size",
    "gradient_accumulation_steps": "batch.size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "model_name": "model.path",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "output_dir": "run.dir",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_rank": "adapter.rank",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "rank_pattern": "adapter.ranks",
    "alpha_pattern": "adapter.alphas",
    "reduction_factor": "adapter.width",
    "bottleneck_size": "adapter.width",
    "lr_scheduler_type": "schedule.name",
    "lr_scheduler": "schedule.name",
    "warmup_ratio": "schedule.warmup_fraction",
    "attn_implementation": "model.attention",
    "load_in_4bit": "adapter",
    "packing": "batch.layout",
    "report_to": "log",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "resume_from_checkpoint": "train.resume",
}
"""What other tools call our keys; the last part of what was typed is looked up here."""


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of `words`, if any is similar."""
    found = get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The real key nearest to `key`: the same last part under another section, another tool's name for it, or a typo."""
    keys = list(keys)
    section, _, leaf = key.rpartition(".")
    same = [k for k in keys if k.rpartition(".")[2] == leaf and k != key]
    if same:
        return max(same, key=lambda k: SequenceMatcher(None, key, k).ratio())
    if OTHER_TOOLS.get(leaf) in keys:
        return OTHER_TOOLS[leaf]
    here = [k.rpartition(".")[2] for k in keys if k.startswith(f"{section}.")] if section else []
    if here:
        near = nearest(leaf, here)
        return f"{section}.{near}" if near else None
    if section:
        return nearest(key, keys)
    if near := nearest(leaf, [k for k in keys if "." not in k] + [k.rpartition(".")[2] for k in keys]):
        return near if near in keys else next(k for k in keys if k.rpartition(".")[2] == near)
    return None
