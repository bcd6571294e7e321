"""The configuration: `resolve` turns arguments into a `Config`; the other names are its sections.

conf/ → Hydra → layers (embedded default, recipes, command line) → schema → Config. Values and explanations stand in
conf/config.yaml, types and ranges in schema.py, what cannot be together in check.py.
"""

from posttrain.config.check import check_processes
from posttrain.config.compose import resolve, resolve_section
from posttrain.config.schema import (
    SECTIONS,
    AdapterConfig,
    BatchConfig,
    Config,
    DataConfig,
    DistributionConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    SweepConfig,
    TrainConfig,
)

__all__ = [
    "SECTIONS",
    "AdapterConfig",
    "BatchConfig",
    "Config",
    "DataConfig",
    "DistributionConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SweepConfig",
    "TrainConfig",
    "check_processes",
    "resolve",
    "resolve_section",
]
