"""Memory that a step frees is there for the next."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
import sparseprop
if sys.argv[1] == "keep":
    assert sparseprop.keep_freed_memory()
faults = []
for _ in range(16):  # small blocks may cut the first few free ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


def faults_of_a_step(mode):
    run = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_a_later_step_finds_the_pages_of_an_earlier_one():
    touched = faults_of_a_step("default")
    assert faults_of_a_step("keep") < touched / 10
