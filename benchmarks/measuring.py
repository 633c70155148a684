"""What all benchmarks share: a figure, the clock, the reference load, peak memory, the machine.

Other work on the machine slows everything alike, and the next machine is another one. So a fixed
load, a float32 matrix product, is timed right beside whatever is measured: a time divided by that
load's is what one run is compared with another by.
"""

from __future__ import annotations

import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from drama.runs.folder import git_commit

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "config" / "presets"

REFERENCE_WIDTH = 2048
"""Rows and columns of the reference load's factors."""
ROUNDS = 3
"""Turns that everything is measured in; the best one counts."""
LEAST_SECONDS = 0.2
"""What takes less is done again until this much time has gone by."""
MIB = 2**20

HIGHER_IS_BETTER = ("MB/s", "GFLOP/s", "times as fast", "steps/s")

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        part: the part of the benchmarks it comes from.
        name: what was measured.
        parameters: at which point, such as {"kind": "mamba2", "length": 512}.
        value: the number.
        unit: its unit.
        ratio: the value over that of the reference load beside it, where a time is behind the value
            (a rate is multiplied instead); None where the machine's speed plays no part.
        limit: what the value may be at most, if something is wanted of it.
        headline: what the README's table calls it; empty when it is not in there.
    """

    part: str
    name: str
    parameters: Mapping[str, str | int]
    value: float
    unit: str
    ratio: float | None = None
    limit: float | None = None
    headline: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same figure in another run."""
        return (self.part, self.name, *sorted(self.parameters.items()))

    @property
    def comparable(self) -> float:
        """What can be held against another run's."""
        return self.value if self.ratio is None else self.ratio

    @property
    def within_limit(self) -> bool:
        """Whether it is what was wanted."""
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class Timing:
    """The best seconds of some work, and of the reference load beside it."""

    seconds: float
    reference: float

    @property
    def ratio(self) -> float:
        """The work's time over the reference load's."""
        return self.seconds / self.reference


class ReferenceLoad:
    """A float32 matrix product of fixed size."""

    operations = 2 * REFERENCE_WIDTH**3

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (2, REFERENCE_WIDTH, REFERENCE_WIDTH)
        self.factors = torch.randn(shape, generator=generator, device=device)
        self.product = torch.empty(shape[1:], device=device)

    def __call__(self) -> None:
        """Compute it once."""
        torch.mm(self.factors[0], self.factors[1], out=self.product)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, least: float = 0.0) -> float:
    """Return the mean seconds of one call, over as many calls as take `least` seconds."""
    synchronise(device)
    calls, start = 0, time.perf_counter()
    while True:
        work()
        synchronise(device)
        calls += 1
        taken = time.perf_counter() - start
        if taken >= least:
            return taken / calls


def take_turns(
    works: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    rounds: int = ROUNDS,
    least: float = LEAST_SECONDS,
) -> dict[Key, Timing]:
    """Time several works one after another, round by round, each beside the reference load.

    Taking turns, a spell of other work on the machine slows all of them and not one of them.

    Args:
        works: by any key.
        device: what they compute on.
        rounds: the best of so many counts.
        least: seconds below which a work is repeated.
    """
    load = ReferenceLoad(device)
    load()
    best = {key: Timing(float("inf"), float("inf")) for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            reference = seconds(load, device)
            best[key] = Timing(
                min(best[key].seconds, seconds(work, device, least)),
                min(best[key].reference, reference),
            )
    return best


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return the precision that training has on a device by default: bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# --- memory ------------------------------------------------------------------------------------


def in_fresh_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """Call a module's function in a new process, whose memory nobody has used before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def resident() -> int:
    """Return the bytes of memory that this process holds now (Linux)."""
    return _process_memory("VmRSS")


def peak() -> int:
    """Return the most bytes that this process has held since `forget_peak` (Linux)."""
    return _process_memory("VmHWM")


def forget_peak() -> None:
    """Begin a new peak. Not `getrusage`, whose peak also covers the process that started this."""
    Path("/proc/self/clear_refs").write_text("5")


def _process_memory(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def added_peak(work: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes held while some work is done, beyond those held before.

    On a GPU it is what PyTorch has handed out there.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident()
    forget_peak()
    work()
    return peak() - before


# --- the machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where and when something was measured.

    Attributes:
        kind: `cpu` or `cuda`.
        device: its name, with the number of cores on a CPU.
        torch: PyTorch's version.
        date: of the measurement, year-month-day.
        commit: the code's, None outside git.
        gigaflops: speed of the reference load, 10^9 operations a second.
    """

    kind: str
    device: str
    torch: str
    date: str
    commit: str | None
    gigaflops: float


def describe(device: torch.device) -> Machine:
    """Describe this machine as it is now."""
    load = ReferenceLoad(device)
    best = min(seconds(load, device) for _ in range(2 * ROUNDS))
    return Machine(
        kind=device.type,
        device=device_name(device),
        torch=torch.__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        commit=git_commit(),
        gigaflops=round(load.operations / best / 1e9, 1),
    )


def device_name(device: torch.device) -> str:
    """Return a device's name, such as `NVIDIA H200` or `Intel Xeon, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", _processor())
    threads = torch.get_num_threads()
    cores = "1 core" if threads == 1 else f"{threads} cores"
    return f"{' '.join(name.split())}, {cores}"


def slug(name: str) -> str:
    """Return a device's name as a file may carry it: `intel-xeon-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
