"""The schema: one dataclass a group, types and ranges only. Values and explanations stand in conf/config.yaml.

A field's metadata may hold min (>=), above (>), max (<=), below (<), for a list or mapping those of its items, length (of a
list), and path (`~` is expanded). Stage dataclasses use the same metadata.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.dump import dump

if TYPE_CHECKING:
    from posttrain.stages.base import Stage


PATH = {"path": True}


@dataclass
class ModelConfig:
    """Which model, and what is changed about it before training."""

    path: str | None = field(metadata=PATH)
    tokenizer: str | None = field(metadata=PATH)
    revision: str | None
    gguf_file: str | None
    init: Literal["weights", "config"]
    config: dict[str, Any]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    rope_scaling: dict[str, Any] | None
    dropout: Literal["none", "keep"]
    chat_template: str | None = field(metadata=PATH)
    reference: str | None = field(metadata=PATH)
    reward: str | None = field(metadata=PATH)
    critic: str | None = field(metadata=PATH)
    frozen_device: Literal["device", "offload", "cpu"]
    trust_remote_code: bool


@dataclass
class AdapterConfig:
    """Adapters; `name` is the choice adapter=none|lora|qlora|bottleneck."""

    name: Literal["none", "lora", "qlora", "bottleneck"]
    rank: int = field(metadata={"min": 1})
    alpha: float = field(metadata={"above": 0})
    dropout: float = field(metadata={"min": 0, "below": 1})
    targets: str | list[str]
    rslora: bool
    dora: bool
    ranks: dict[str, int] = field(metadata={"min": 1})
    alphas: dict[str, float] = field(metadata={"above": 0})
    placement: Literal["both", "ffn", "attention"]
    width: int = field(metadata={"min": 1})
    activation: Literal["relu", "gelu", "silu", "tanh"]
    path: str | None = field(metadata=PATH)


@dataclass
class DataConfig:
    """Which rows, how they are read, and how they become tokens."""

    train: str | list[str] | None = field(metadata=PATH)
    eval: str | list[str] | None = field(metadata=PATH)
    eval_fraction: float = field(metadata={"min": 0, "below": 1})
    train_limit: int | None = field(metadata={"min": 1})
    eval_limit: int | None = field(metadata={"min": 1})
    shuffle: bool
    streaming: bool
    shuffle_buffer: int = field(metadata={"min": 1})
    mix: list[float] | None = field(metadata={"min": 0})
    format: Literal["auto", "text", "prompt_completion", "messages", "pairs", "groups", "scored", "prompts"]
    columns: dict[str, str]
    reward_weights: dict[str, float]
    template: Literal["auto", "chat", "none"]
    document_separator: str | None
    max_length: int = field(metadata={"min": 2})
    on_too_long: Literal["drop", "truncate", "split", "error"] | None
    on_bad_row: Literal["error", "skip"]
    max_lost_fraction: float = field(metadata={"min": 0, "max": 1})
    cache: str | None = field(metadata=PATH)


@dataclass
class BatchConfig:
    """What one optimizer step holds, and how it is laid out in memory."""

    size: int | None = field(metadata={"min": 1})
    tokens: int | None = field(metadata={"min": 1})
    micro_tokens: int | None = field(metadata={"min": 1})
    micro_size: int | None = field(metadata={"min": 1})
    layout: Literal["auto", "padded", "packed", "shared"]


@dataclass
class OptimConfig:
    """The optimizer; `name` is the choice optim=adamw|..."""

    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adamw_bf16"]
    lr: float = field(metadata={"above": 0})
    betas: list[float] = field(metadata={"min": 0, "below": 1, "length": 2})
    eps: float = field(metadata={"above": 0})
    weight_decay: float = field(metadata={"min": 0})
    decay_all: bool
    max_grad_norm: float = field(metadata={"above": 0})


@dataclass
class ScheduleConfig:
    """The learning rate over the steps; `name` is the choice schedule=cosine|..."""

    name: Literal["cosine", "linear", "constant", "wsd"]
    warmup_steps: int | None = field(metadata={"min": 0})
    warmup_fraction: float | None = field(metadata={"min": 0, "below": 1})
    min_lr_fraction: float = field(metadata={"min": 0, "max": 1})
    decay_fraction: float = field(metadata={"above": 0, "max": 1})


@dataclass
class PrecisionConfig:
    """The arithmetic; `name` is the choice precision=fp32|tf32|fp16|bf16|fp8."""

    name: Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
    recipe: Literal["tensorwise", "rowwise"]
    emulate: bool


@dataclass
class TrainConfig:
    """How long, how often to look and to save, and what to continue."""

    steps: int | None = field(metadata={"min": 1})
    epochs: float | None = field(metadata={"above": 0})
    gradient_checkpointing: bool
    seed: int = field(metadata={"min": 0, "below": 2**32})
    log_every: int = field(metadata={"min": 1})
    eval_every: int | None = field(metadata={"min": 1})
    save_every: int | None = field(metadata={"min": 1})
    keep_checkpoints: int = field(metadata={"min": 1})
    resume: str = field(metadata=PATH)
    patience: int | None = field(metadata={"min": 1})


@dataclass
class EvalConfig:
    """Scores and their intervals."""

    confidence_level: float = field(metadata={"above": 0, "below": 1})
    resamples: int | None = field(metadata={"min": 100})
    bins: int = field(metadata={"min": 1})
    generate: int = field(metadata={"min": 0})
    max_new_tokens: int = field(metadata={"min": 1})
    verifier: Literal["none", "exact", "number", "math"]
    slices: list[str]
    harness: list[str]
    harness_path: str | None = field(metadata=PATH)
    harness_limit: int | None = field(metadata={"min": 1})
    harness_shots: int | None = field(metadata={"min": 0})


@dataclass
class DistributionConfig:
    """How ranks share the work; `name` is the choice distribution=single|ddp|fsdp|deepspeed."""

    name: Literal["single", "ddp", "fsdp", "deepspeed"]
    cpu_offload: bool
    zero_stage: int = field(metadata={"min": 2, "max": 3})
    connect_seconds: float = field(metadata={"above": 0})


@dataclass
class RunConfig:
    """Where the run is written, and by how many processes."""

    dir: str | None = field(metadata=PATH)
    root: str = field(metadata=PATH)
    name: str | None
    processes: int | None = field(metadata={"min": 1})


@dataclass
class LogConfig:
    """Where metrics go besides metrics.jsonl; `name` is the choice log=local|wandb|tensorboard."""

    name: Literal["local", "wandb", "tensorboard"]
    project: str
    entity: str | None
    mode: Literal["online", "offline", "disabled"]
    report: bool


@dataclass
class SweepConfig:
    """How the jobs of `posttrain --multirun` are run. It is of no single run, so no run's record has it."""

    launcher: Literal["local", "slurm"]
    partition: str | None
    account: str | None
    gpus: int | None = field(metadata={"min": 0})
    cpus: int | None = field(metadata={"min": 1})
    memory_gb: float | None = field(metadata={"above": 0})
    timeout_minutes: int = field(metadata={"min": 1})
    requeues: int = field(metadata={"min": 0})
    max_parallel: int | None = field(metadata={"min": 1})
    setup: list[str]


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "batch": BatchConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "precision": PrecisionConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "distribution": DistributionConfig,
    "run": RunConfig,
    "log": LogConfig,
    "sweep": SweepConfig,
}
"""Every section but the stage's own, whose dataclass is the stage itself."""


@dataclass
class Config:
    """A whole run. stage: an instance of the stage's dataclass, whose fields are stage.*. overrides: as they were typed."""

    stage_name: str
    stage: Stage
    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    train: TrainConfig
    eval: EvalConfig
    distribution: DistributionConfig
    run: RunConfig
    log: LogConfig
    sweep: SweepConfig
    overrides: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON and YAML alike, in the order of conf/config.yaml; the stage's name is stage.name.
        sweep.* is left out: it says how several runs were started, and nothing of this one."""
        stage = {"name": self.stage_name, **asdict(self.stage)}
        return {"stage": stage, **{name: asdict(getattr(self, name)) for name in SECTIONS if name != "sweep"}}

    def to_yaml(self) -> str:
        """A recipe that gives this config again, whatever the defaults have become by then."""
        return dump(self.as_dict())
