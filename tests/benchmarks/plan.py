"""What `posttrain plan` says of memory and time against what runs then take: writes a section of tests/benchmarks/RESULTS.md.

    make bench-plan

Measured: every block that torch's allocator gives and takes back while the run trains, from the profiler's records, which the
plan does not use; of the cases of two ranks on each of two processes; and of the larger cases the process's largest resident
set. Random weights, so that a case's size can be chosen; each case trains three steps.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from run import write

GIB = 2**30
MARK = "profiled: "
MODEL = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192,
}  # fmt: skip
LARGER = MODEL | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 16_384}
COMMON = [
    "model.path=embedded", "model.init=config", "train.epochs=null", "train.steps=3", "data.max_length=64",
    "data.eval_limit=16", "eval.generate=0", "eval.resamples=100", "log.report=false", "precision=fp32", "batch.size=160",
    "run.root=runs",
]  # fmt: skip
SFT = ["stage=sft", "data.train=embedded:prompt_completion:4000"]
BF16 = ["precision=bf16", "batch.size=80", "batch.micro_tokens=448"]
PPO = ["stage=ppo", "data.train=embedded:prompts:4000", "stage.rewards=[exact]", "stage.samples=4", "batch.size=48",
       "stage.max_new_tokens=12", "stage.epochs=2", "eval.generate=8"]  # fmt: skip
CASES = {
    "sft": SFT,
    "sft, one micro-batch a step": [*SFT, "batch.size=64"],
    "sft, bf16": [*SFT, *BF16],
    "sft, packed": [*SFT, "batch.layout=packed"],
    "sft, eager attention": [*SFT, "model.attention=eager"],
    "sft, gradient checkpointing": [*SFT, "train.gradient_checkpointing=true"],
    "sft, gradient checkpointing, bf16": [*SFT, "train.gradient_checkpointing=true", *BF16],
    "lora": ["stage=lora", *SFT[1:], "adapter.targets=all-linear"],
    "lora, bf16": ["stage=lora", *SFT[1:], *BF16],
    "qlora, the embedded model": ["stage=qlora", *SFT[1:], "adapter.targets=all-linear", "model.init=weights"],
    "sft, 8-bit AdamW": [*SFT, "optim=adamw8bit"],
    "dpo, shared": ["stage=dpo", "data.train=embedded:pairs:2000", "batch.layout=shared"],
    "dpo, padded, lora": ["stage=dpo", "adapter=lora", "data.train=embedded:pairs:2000", "batch.layout=padded"],
    "reward": ["stage=reward", "data.train=embedded:pairs:2000"],
    "gpro": ["stage=gpro", "data.train=embedded:groups:1000", "batch.size=64"],
    "ppo": PPO,
    "ppo, group advantages, bf16": ["stage=grpo", *PPO[1:], *BF16, "batch.size=12"],
    "ppo, lora": [*PPO, "adapter=lora"],
    "pretrain": ["stage=pretrain", "data.train=embedded:text:4000"],
}
"""Name: overrides."""

RANKS = 2
SHARDED = {
    "sft, ddp": [*SFT, "distribution=ddp"],
    "sft, fsdp": [*SFT, "distribution=fsdp"],
    "sft, fsdp, bf16": [*SFT, *BF16, "distribution=fsdp"],
    "sft, fsdp, gradient checkpointing": [*SFT, "distribution=fsdp", "train.gradient_checkpointing=true"],
    "lora, fsdp": ["stage=lora", *SFT[1:], "adapter.targets=all-linear", "distribution=fsdp"],
    "lora, fsdp, bf16": ["stage=lora", *SFT[1:], *BF16, "distribution=fsdp"],
    "qlora, the embedded model, fsdp": [*CASES["qlora, the embedded model"], "distribution=fsdp"],
    "dpo, shared, fsdp": [*CASES["dpo, shared"], "distribution=fsdp"],
    "gpro, fsdp": [*CASES["gpro"], "distribution=fsdp"],
    "ppo, fsdp": [*PPO, "distribution=fsdp"],
}
if importlib.util.find_spec("deepspeed"):
    SHARDED |= {f"sft, ZeRO {n}": [*SFT, "distribution=deepspeed", f"distribution.zero_stage={n}"] for n in (2, 3)}
"""Of RANKS ranks."""


@dataclass
class Measured:
    """window: nanoseconds of the training loop; seconds: of each optimizer step; resident: its largest set in bytes."""

    window: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: int = 0


def overrides(case: str, model: dict[str, int]) -> list[str]:
    given = [*COMMON, *(CASES | SHARDED)[case], *([f"run.processes={RANKS}"] if case in SHARDED else [])]
    if "model.init=weights" in given:  # 4 bits are made of weights alone
        return given
    return [*given, *(f"model.config.{key}={value}" for key, value in model.items())]


def planned(arguments: list[str]) -> dict[str, Any]:
    """What `posttrain plan` says."""
    import posttrain.tools.plan as tool
    from posttrain.config import resolve
    from posttrain.planning.memory import peak

    found: list[Any] = []
    estimate = tool.estimate
    tool.estimate = lambda *given: found.append(estimate(*given)) or found[0]  # type: ignore[attr-defined,func-returns-value]
    try:
        tool.plan(resolve(arguments, "plan"))
    finally:
        tool.estimate = estimate  # type: ignore[attr-defined]
    if found[0].times is None:
        raise SystemExit(f"not measured: {found[0].measured}")
    moment, size = peak(found[0].moments)
    seconds, process = found[0].times.step.value, found[0].process
    return {"moment": moment, "planned": size, "planned_seconds": seconds, "process": process}


@contextmanager
def watching() -> Iterator[Measured]:
    """The training loop's window and steps; nothing is saved."""
    from posttrain import train

    found = Measured()
    fit, update = train.Trainer._fit, train.Trainer._update
    save_checkpoint, write_model = train.save_checkpoint, train.write_model

    def timed_fit(self: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set counts from here
        found.window.append(time.time_ns())
        try:
            return fit(self)
        finally:
            found.window.append(time.time_ns())
            status = Path("/proc/self/status").read_text()
            found.resident = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])

    def timed_update(self: Any, step: Any) -> None:
        began = time.perf_counter()
        update(self, step)
        found.seconds.append(time.perf_counter() - began)

    train.Trainer._fit, train.Trainer._update = timed_fit, timed_update  # type: ignore[method-assign]
    train.save_checkpoint = train.write_model = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield found
    finally:
        train.Trainer._fit, train.Trainer._update = fit, update  # type: ignore[method-assign]
        train.save_checkpoint, train.write_model = save_checkpoint, write_model


def allocated(events: Any, window: list[int]) -> int:
    """The most bytes of torch's allocator that were given at once, within the window."""
    blocks = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for at, size in blocks:
        live += size
        if window[0] <= at <= window[1]:
            most = max(most, live)
    return most


def profiled(case: str) -> dict[str, Any]:
    """Of one run in this process: the most bytes allocated, and the seconds of a step."""
    from torch.profiler import ProfilerActivity, profile

    from posttrain import run

    with watching() as seen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run(overrides(case, MODEL))
    measured = allocated(records.profiler.kineto_results.events(), seen.window)
    return {"measured": measured, "seconds": sum(seen.seconds[1:]) / len(seen.seconds[1:])}


def measure(case: str) -> dict[str, Any]:
    """Planned and measured: bytes and seconds."""
    return planned(overrides(case, MODEL)) | {"case": case} | (on_ranks(case) if case in SHARDED else profiled(case))


def on_ranks(case: str) -> dict[str, Any]:
    """profiled() of the rank that holds most."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).resolve()), "--profiled", case],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stdout[-2000:]}{done.stderr[:3000]}")
    told = [json.loads(line.partition(MARK)[2]) for line in done.stdout.splitlines() if MARK in line]
    return max(told, key=lambda each: each["measured"])


def alone(case: str) -> dict[str, Any]:
    """A case, larger, planned and run in a process of its own each: a process keeps what it frees."""
    return {"case": case} | _told("--planned", case) | _told("--resident", case)


def _told(what: str, case: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), what, case], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.rpartition(MARK)[2])
    return found


def resident(case: str) -> int:
    """The largest set in bytes while it trains."""
    from posttrain import run

    with watching() as seen:
        run(overrides(case, LARGER))
    return seen.resident


def section(found: list[dict[str, Any]], larger: list[dict[str, Any]]) -> str:
    lines = [
        f"## The plan against the run, {datetime.date.today()}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU; torch {version('torch')}, transformers "
        f"{version('transformers')}.",
        f"Random weights, Llama's architecture, {MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, "
        f"{MODEL['vocab_size']:,} tokens; three steps; `posttrain plan` ran one layer.",
        "Memory: the most of torch's allocator in the training loop, MiB. Time: of an optimizer step, the first left out.",
        f"Cases with ddp, fsdp or ZeRO: of the fuller of {RANKS} gloo ranks; their memory alone, which differs by up to 14 % "
        "from run to run, for gloo holds copies of what it sends.",
        "",
        "| case | at most in | planned | measured | ratio | planned s | measured s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        a, b = each["planned"] / 2**20, each["measured"] / 2**20
        row = f"| {each['case']} | {each['moment']} | {a:,.1f} | {b:,.1f} | {a / b:.2f} | "
        if each["case"] in SHARDED:
            lines.append(f"{row} – | – | – |")
            continue
        planned_s, seconds = each["planned_seconds"], each["seconds"]
        lines.append(f"{row}{planned_s:.2f} | {seconds:.2f} | {planned_s / seconds:.2f} |")
    if larger:
        lines += [
            "",
            f"The process's largest resident set in the training loop, {LARGER['num_hidden_layers']} layers of "
            f"{LARGER['hidden_size']}, {LARGER['vocab_size']:,} tokens, GiB; planned: with what the process holds before; "
            "a process keeps some of what it has freed.",
            "",
            "| case | planned | measured | ratio |",
            "|---|---|---|---|",
        ]
        for each in larger:
            a, b = (each["planned"] + each["process"]) / GIB, each["resident"] / GIB
            lines.append(f"| {each['case']} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*CASES, *SHARDED], help="cases, by name")
    parser.add_argument("--larger", nargs="*", default=["sft", "lora", "dpo, shared"], help="cases of the resident set")
    parser.add_argument("--profiled", help="one case, run here: prints its bytes and seconds")
    parser.add_argument("--planned", help="one of the larger cases: prints what is planned")
    parser.add_argument("--resident", help="one of the larger cases: prints its resident set in bytes")
    options = parser.parse_args()
    if options.profiled or options.planned or options.resident:  # started by this script, where it is
        found: dict[str, Any] = {}
        if options.profiled:
            found = profiled(options.profiled)
        elif options.planned:
            found = planned(overrides(options.planned, LARGER))
        else:
            found = {"resident": resident(options.resident)}
        print(MARK + json.dumps(found), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["XDG_CACHE_HOME"] = scratch
        measured = []
        for case in options.only:
            measured.append(measure(case))
            told = measured[-1]
            print(f"{case:36}planned {told['planned']:>12,} measured {told['measured']:>12,} "
                  f"{told['planned'] / told['measured']:.3f} in {told['moment']}, seconds {told['planned_seconds']:.2f} "
                  f"{told['seconds']:.2f}", file=sys.stderr, flush=True)  # fmt: skip
        larger = []
        for case in options.larger:
            larger.append(alone(case))
            print(larger[-1], file=sys.stderr, flush=True)
    text = section(measured, larger)
    write("plan", text)
    print(text)


if __name__ == "__main__":
    main()
