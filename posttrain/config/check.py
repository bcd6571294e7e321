"""What keys cannot be together, in one place. Ranges of single keys stand in the schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.config.schema import Config

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BF16_WEIGHTS = "adamw_bf16"


def check(config: Config, verb: str = "train") -> None:
    """Raise ConfigError for the first thing that cannot be."""
    _check_model_and_data(config, verb)
    _one_of(config, "train.steps", "train.epochs", needed=True)
    _one_of(config, "batch.size", "batch.tokens", needed=True)
    _one_of(config, "batch.micro_tokens", "batch.micro_size")
    _one_of(config, "schedule.warmup_steps", "schedule.warmup_fraction")
    _one_of(config, "run.dir", "run.name")
    _check_schedule(config)
    _check_streaming(config, verb)
    _check_harness(config, verb)
    _check_distribution(config)
    _check_precision(config)
    if verb in ("train", "plan"):
        _check_masters(config)
    _check_adapter(config)
    if config.eval.verifier != "none" and config.eval.generate == 0:
        raise ConfigError(
            f"eval.verifier={config.eval.verifier} needs answers to verify, but eval.generate=0; try eval.generate=100"
        )
    typed = [override for override in config.overrides if override.lstrip("+").startswith("sweep.")]
    if typed:
        raise ConfigError(f"{typed[0]} is of sweeps alone: posttrain --multirun {typed[0]} ...; leave it out here")
    config.stage.check()


def check_processes(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """run.processes says how many the user expects; another number is a mistake to be told."""
    expected, world = config.run.processes, int(environment.get("WORLD_SIZE", "1"))
    if expected is None or expected == world:
        return
    if "WORLD_SIZE" in environment or "RANK" in environment:
        raise ConfigError(
            f"run.processes={expected}, but the launcher started {world}; let it start {expected} (torchrun "
            f"--nproc_per_node {expected} -m posttrain ...), leave run.processes out, or leave the launcher out: posttrain "
            f"run.processes={expected} ... starts them itself"
        )
    raise ConfigError(
        f"run.processes={expected}, but from Python a run is the one process that calls it; leave run.processes out, or "
        f"start it from a shell: posttrain run.processes={expected} ..."
    )


def _check_model_and_data(config: Config, verb: str) -> None:
    train, held_out, model = config.data.train, config.data.eval, config.model.path
    if model is None and config.model.gguf_file is not None:
        raise ConfigError(
            "model.gguf_file is a file inside model.path, which is not given; set model.path to its folder"
        )
    if model is None:
        given = (
            f"data.train={_shown(train)} is given" if train else "data.eval is given" if held_out else "data is given"
        )
        raise ConfigError(
            f"{given} without a model: set model.path to a folder or hub id, for example model.path={SMALL_MODEL}"
        )
    if train is None and (verb != "eval" or held_out is None) and not (verb == "eval" and config.eval.harness):
        key = "data.eval" if verb == "eval" else "data.train"
        raise ConfigError(
            f"model.path={model} is given without data: set {key} to a file, a list of files or a hub id, "
            f"for example {key}=my.jsonl; with neither model nor data the embedded ones are used"
        )


def _check_schedule(config: Config) -> None:
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if warmup is not None and steps is not None and warmup >= steps:
        raise ConfigError(f"schedule.warmup_steps={warmup} leaves nothing of train.steps={steps}; try {steps // 10}")


def _check_streaming(config: Config, verb: str) -> None:
    if config.data.streaming and not config.stage.streams:
        raise ConfigError(
            f"data.streaming=true, but stage={config.stage_name} reads all of its data before it trains; leave it out"
        )
    if not config.data.streaming or config.data.train is None:
        return
    if verb == "prepare":
        raise ConfigError(
            "data.streaming=true tokenises while training, so there is nothing to prepare; leave data.streaming out "
            "to write the tokens of data.train to data.cache"
        )
    if config.train.steps is None and verb in ("train", "plan"):
        raise ConfigError(
            "data.streaming=true needs train.steps: how long an epoch is cannot be known before the data is read, "
            f"got train.epochs={config.train.epochs:g}; try train.steps=1000 (the data starts over where it ends)"
        )


def _check_distribution(config: Config) -> None:
    name = config.distribution.name
    if name == "single" and (config.run.processes or 1) > 1:
        raise ConfigError(
            f"run.processes={config.run.processes}, but distribution=single is one process; set distribution=ddp"
        )
    if config.distribution.cpu_offload and name not in ("fsdp", "deepspeed"):
        raise ConfigError(
            f"distribution.cpu_offload=true is of distribution=fsdp or deepspeed, and distribution={name}; leave it out, or set "
            "distribution=fsdp"
        )
    if name not in ("fsdp", "deepspeed"):
        return
    if config.optim.name not in ("adamw", "adamw_bf16"):
        raise ConfigError(
            f"optim={config.optim.name} with distribution={name}: bitsandbytes' optimizers take whole tensors, and each rank "
            "has a part of them; set optim=adamw (whose states are in parts on the ranks too), or distribution=ddp"
        )
    if name == "fsdp" and config.optim.name == "adamw_bf16" and config.model.critic is not None:
        raise ConfigError(
            f"model.critic={config.model.critic} trains in fp32, and optim=adamw_bf16 with distribution=fsdp gathers it beside "
            "bf16 weights; set optim=adamw, or leave model.critic out (a head on the policy)"
        )
    if name == "deepspeed":
        _check_zero(config)


def _check_zero(config: Config) -> None:
    """What DeepSpeed's ZeRO cannot do with the trainer's steps."""
    if config.precision.name == "fp16":
        raise ConfigError(
            "precision=fp16 with distribution=deepspeed: ZeRO clips and steps by itself, past the loss scale; set "
            "precision=bf16, or distribution=fsdp"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            f"optim={config.optim.name} with distribution=deepspeed: ZeRO's parts of the optimizer are AdamW's in fp32; set "
            "optim=adamw, or distribution=fsdp"
        )
    if warmup := getattr(config.stage, "critic_warmup", 0):
        raise ConfigError(
            f"stage.critic_warmup={warmup} with distribution=deepspeed: ZeRO moves all weights of a step together, and while the "
            "critic warms up the rest stands still; set stage.critic_warmup=0, or distribution=fsdp"
        )


def _check_adapter(config: Config) -> None:
    adapter, server = config.adapter, getattr(config.stage, "rollout_server", None)
    if adapter.path is not None and adapter.name == "none":
        raise ConfigError(
            f"adapter.path={adapter.path} is given, but adapter=none; set adapter=lora, qlora or bottleneck, whichever it is"
        )
    of_lora = [f"adapter.{key}" for key in ("rslora", "dora", "ranks", "alphas") if getattr(adapter, key)]
    if of_lora and adapter.name == "bottleneck":
        raise ConfigError(f"{of_lora[0]} is of adapter=lora and qlora, but adapter=bottleneck; leave it out")
    unread = ["adapter=bottleneck"] if adapter.name == "bottleneck" else []
    if adapter.name in ("lora", "qlora"):
        unread = [key for key in of_lora if key != "adapter.rslora"]
    if server is not None and unread:
        raise ConfigError(
            f"stage.rollout_server={server} reads adapters of one rank and one alpha without DoRA, so not {unread[0]}; leave "
            "the server out and this process writes the answers itself, or take a plain adapter=lora"
        )


def _check_harness(config: Config, verb: str) -> None:
    options = config.eval
    tasks = f"eval.harness=[{','.join(options.harness)}]"
    if not options.harness:
        names = ("harness_path", "harness_limit", "harness_shots")
        given = [f"eval.{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
        if given:
            raise ConfigError(f"{given[0]} is given, but eval.harness names no task; try eval.harness=[arc_easy]")
        return
    if verb != "eval":
        raise ConfigError(
            f"{tasks} is of posttrain eval alone, not of {verb}; leave it out here, and score the trained model with "
            f"posttrain eval model.path=RUN {tasks}"
        )
    if config.stage.head(set()) is not None and (config.data.train or config.data.eval):
        raise ConfigError(
            f"{tasks} needs a model that writes answers, and stage={config.stage_name} scores the data with a reward model; "
            "run them apart, the harness with model.path=POLICY and no data"
        )


def _check_precision(config: Config) -> None:
    """The keys of fp8 alone, and what fp8 cannot multiply."""
    precision = config.precision
    if precision.name != "fp8":
        given = [f"recipe={precision.recipe}"] if precision.recipe != "tensorwise" else []
        given += ["emulate=true"] if precision.emulate else []
        if given:
            raise ConfigError(
                f"precision.{given[0]} is of precision=fp8, and precision={precision.name}; leave it out, or set precision=fp8"
            )
    elif config.adapter.name == "qlora":
        raise ConfigError(
            "precision=fp8 with adapter=qlora: the frozen weights are in 4 bits, which have no float8 products; use "
            "adapter=lora, or precision=bf16"
        )


def _check_masters(config: Config) -> None:
    """Weights in 16 bits train with an optimizer that rounds them stochastically, and that one with nothing else."""
    adapter, dtype, precision = config.adapter.name, config.model.dtype, config.precision.name
    if config.optim.name == BF16_WEIGHTS and adapter != "none":
        raise ConfigError(
            f"optim={BF16_WEIGHTS} does without fp32 masters, and with adapter={adapter} only the adapter's few weights have "
            "any; use optim=adamw"
        )
    if config.optim.name == BF16_WEIGHTS and (dtype != "bfloat16" or precision not in ("bf16", "fp8")):
        raise ConfigError(
            f"optim={BF16_WEIGHTS} trains weights that are bf16, but model.dtype={dtype} and precision={precision}; set "
            "model.dtype=bfloat16 precision=bf16, or use optim=adamw"
        )
    if config.optim.name != BF16_WEIGHTS and adapter == "none" and dtype in ("bfloat16", "float16"):
        instead = f", or set optim={BF16_WEIGHTS}, which rounds at random" if dtype == "bfloat16" else ""
        raise ConfigError(
            f"model.dtype={dtype} would train weights without fp32 masters, and small updates would be rounded away; "
            f"leave model.dtype=auto (precision=bf16 computes in bf16), or train an adapter{instead}"
        )


def _one_of(config: Config, one: str, other: str, needed: bool = False) -> None:
    values = {key: _get(config, key) for key in (one, other)}
    given = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
        if value is not None
    ]
    if len(given) == 2:
        raise ConfigError(f"{given[0]} and {given[1]} are both given; keep one and leave the other out")
    if needed and not given:
        raise ConfigError(f"neither {one} nor {other} is given; set one of them")


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"[{','.join(value)}]"
