"""posttrain: one config, one loop, every score with its interval."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.train import Summary

__version__ = "0.1.0"

# Where torchao is installed transformers imports it, whatever the run; on a machine without a GPU it then warns of kernels for
# GPUs, and makes torch warn of how it registers its enums.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in str(record.msg))


def run(overrides: Iterable[str] = ()) -> Summary:
    """A whole training run from Python: `posttrain.run(["stage=sft", "data.train=my.jsonl", "model=smollm2_135m"])`."""
    from posttrain.config import check_processes, resolve

    config = resolve(overrides)
    check_processes(config)
    from posttrain.train import train

    return train(config)
