"""What a CPU run frees stays with the process: counted in the kernel's page faults, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from posttrain.allocator import keep_freed_memory

def faults():  # of tensors of 64 MB, made and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
print(keep_freed_memory())
for _ in range(3):
    faults()  # the heap grows to what is needed
print(before, faults())
"""


def faults(environment: dict[str, str]) -> tuple[str, int, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    kept, counts = done.stdout.splitlines()
    before, after = map(int, counts.split())
    return kept, before, after


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has no such setting")
def test_freed_memory_is_used_again() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, before, after = faults(environment)
    assert kept == "True"
    assert before > 50 * max(after, 1)  # 16,384 pages each time, before
    kept, before, after = faults(environment | {"MALLOC_ARENA_MAX": "2"})
    assert kept == "False", "who sets the allocator is left alone"
    assert after > before / 2
