"""How a job uses the machine: memory that is kept, precision that a CPU has no units for."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from drama.pipeline.jobs import slow_bfloat16

MEMORY = """
import ctypes, sys
import torch
from drama.pipeline.jobs import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if sys.argv[1] == "kept":
    keep_freed_memory()
before = mallinfo2()
tensor = torch.zeros(10 * 2**20)  # 40 MiB, above the 32 from which glibc maps memory on its own
mapped = mallinfo2().hblks - before.hblks
del tensor
print(mapped, mallinfo2().fordblks // 2**20)
"""


def memory(mode: str) -> list[int]:
    """Mappings made for a tensor, and MiB that lie free in the heap when it is gone."""
    command = [sys.executable, "-c", MEMORY, mode]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in output.split()]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc since 2.33 can be asked"
)
def test_memory_that_was_freed_is_kept_for_the_next_tensor() -> None:
    mapped, free = memory("kept")
    assert mapped == 0 and free >= 40
    mapped, free = memory("returned")
    assert mapped == 1 and free < 40


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
