"""`posttrain doctor`: what this machine has, and what would go wrong on it."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

import torch

from posttrain.environment import environment
from posttrain.report.console import Console

GIB = 2**30
LAUNCHER = ("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
EXTRAS = {
    "wandb": "log=wandb",
    "tensorboard": "log=tensorboard",
    "gguf": "model.gguf_file",
    "sentencepiece": "some tokenizers",
    "torchao": "precision=fp8",
}


def doctor(argv: list[str]) -> None:
    """Print versions, devices, disk, memory and launcher settings; takes no arguments."""
    del argv
    console, facts = Console(), environment()
    console.facts("posttrain " + facts["posttrain"], [("python", f"{facts['python']} ({sys.executable})")])
    console.facts("packages", [(name, found or "missing") for name, found in facts["packages"].items()])
    console.facts(
        "extras",
        [(name, "installed" if find_spec(name) else f"missing ({why} needs it)") for name, why in EXTRAS.items()],
    )
    console.facts("devices", _devices())
    free = shutil.disk_usage(os.getcwd()).free
    console.facts("here", [("working directory", os.getcwd()), ("free disk", f"{free / GIB:.0f} GiB")])
    said = [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(LAUNCHER)]
    console.facts("launcher settings in the environment", said or [("none", "one process, as posttrain alone decides")])


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 {_cpu_bf16()}")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        rows.append((f"cuda:{i}", f"{found.name}, {found.total_memory / GIB:.0f} GiB, {bf16}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "none found" + ("" if torch.version.cuda else " (this torch is built without CUDA)")))
    return rows


def _cpu_bf16() -> str:
    """Whether the processor multiplies bf16 itself; without that bf16 is slower than fp32 there."""
    with_amx = torch.cpu._is_amx_tile_supported()
    return (
        "in hardware (AMX)"
        if with_amx
        else "in hardware (AVX-512)"
        if torch.cpu._is_avx512_bf16_supported()
        else "emulated: use precision=fp32"
    )
