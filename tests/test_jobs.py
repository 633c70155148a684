"""How a job uses the machine: memory that is kept, precision that a CPU has no units for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from drama.jobs import slow_bfloat16

FAULTS = """
import resource, sys
import torch
from drama.jobs import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def touch():
    return torch.zeros(10 * 2**20).add_(1)  # 40 MiB, above glibc's usual limit of 32
touch(), touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    """40 MiB are 10 240 pages of 4 KiB, or 20 huge ones: without it, all anew each time."""
    kept, returned = faults("kept"), faults("returned")
    assert kept < 10 <= 100 < returned


@pytest.mark.parametrize(
    ("precision", "device", "capabilities", "said"),
    [
        ("bfloat16", "cpu", {"avx2": True, "avx512_bf16": False}, True),
        ("bfloat16", "cpu", {"avx2": True, "avx512_bf16": True}, False),
        ("bfloat16", "cpu", {"amx_bf16": True}, False),
        ("bfloat16", "cuda", {}, False),
        ("float32", "cpu", {}, False),
        ("auto", "cpu", {}, False),
    ],
)
def test_a_precision_without_units_is_said_to_be_slow(
    precision: str,
    device: str,
    capabilities: dict[str, bool],
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bool(slow_bfloat16(precision, torch.device(device))) == said
