"""What a run ran with, for its environment.json and for `posttrain doctor`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "hydra-core", "numpy", "scipy")
OPTIONAL = ("lm-eval", "torchao")
"""Recorded where they are installed: what a score is depends on them too."""


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware."""
    return {
        "posttrain": version("posttrain"),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES}
        | {name: found for name in OPTIONAL if (found := package_version(name))},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def package_version(name: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the folder the user works in, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
