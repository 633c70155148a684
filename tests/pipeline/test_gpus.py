"""Choosing a GPU: real processes, given names of GPUs instead of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drama.errors import ConfigurationError
from drama.pipeline import gpus
from drama.pipeline.gpus import GpuUnusable, allocated, choose, count

CLAIM = (
    "import sys; from pathlib import Path; from drama.pipeline.gpus import claim\n"
    "print(claim(sys.argv[2:], Path(sys.argv[1])), flush=True)\n"
    "sys.stdin.read()\n"
)
GPUS = ("GPU-a", "GPU-b", "GPU-c")


class Claims:
    """Processes that took a GPU and hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, number: int, names: tuple[str, ...] = GPUS) -> list[int]:
        """Start some processes at once; return what each took."""
        started = [
            subprocess.Popen(
                [sys.executable, "-c", CLAIM, str(self.folder), *names],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(number)
        ]
        self.processes += started
        return [int(process.stdout.readline()) for process in started if process.stdout]

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()


@pytest.fixture
def claims(tmp_path: Path):
    started = Claims(tmp_path / "gpus")
    yield started
    for process in started.processes:
        started.kill(process)


def test_processes_started_at_once_each_get_a_gpu(claims: Claims) -> None:
    assert sorted(claims.start(3)) == [0, 1, 2]


def test_more_processes_than_gpus_share_them_evenly(claims: Claims) -> None:
    assert Counter(claims.start(6)) == {0: 2, 1: 2, 2: 2}


def test_a_killed_process_leaves_its_gpu_to_the_next(claims: Claims) -> None:
    taken = claims.start(3)
    claims.kill(claims.processes[taken.index(1)])
    assert claims.start(1) == [1]


def test_a_process_that_sees_fewer_gpus_chooses_among_those(claims: Claims) -> None:
    assert claims.start(1, ("GPU-b", "GPU-c")) == [0]
    assert sorted(claims.start(2)) == [0, 2], "GPU-b is taken, whatever its place in the list"


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("0", 1), ("0,2,GPU-77", 3)])
def test_gpus_that_were_chosen_for_us_are_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count() == expected


def test_a_machine_without_a_driver_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count() == 0


# --- a GPU that was allocated and is not seen ----------------------------------------------------

ALLOCATION = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
unseen = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in ALLOCATION:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@unseen
@pytest.mark.parametrize("variable", ALLOCATION)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_allocated_gpu_that_torch_does_not_see_is_an_error_that_another_node_may_mend(
    environment: pytest.MonkeyPatch, tmp_path: Path, variable: str, device: str
) -> None:
    environment.setenv(variable, "3")
    environment.setenv("PATH", str(tmp_path))
    environment.setattr(gpus, "DRIVER", tmp_path / "none")
    with pytest.raises(
        GpuUnusable, match=rf"^{variable}=3: .*; no NVIDIA driver here\. "
    ) as caught:
        choose(device)
    assert caught.value.exit_code == 1
    if not torch.backends.cuda.is_built():
        assert "Torch not compiled with CUDA enabled" in str(caught.value)
    (tmp_path / "none").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    with pytest.raises(GpuUnusable, match=r"NVIDIA's driver is 535\.104\.05\. "):
        choose(device)
    assert choose("cpu").type == "cpu", "what is asked for in so many words is done"


@unseen
def test_without_an_allocation_auto_takes_the_cpu_and_cuda_says_why_it_cannot(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("PATH", str(tmp_path))
    environment.setattr(gpus, "DRIVER", tmp_path / "none")
    assert choose("auto").type == "cpu"
    with pytest.raises(
        ConfigurationError, match=r"sees 0 GPUs here \(.*no NVIDIA driver here\); use"
    ):
        choose("cuda")


@pytest.mark.parametrize("hidden", ["", " ", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_are_not_allocated(
    environment: pytest.MonkeyPatch, hidden: str
) -> None:
    environment.setenv("SLURM_JOB_GPUS", "0,1")
    assert allocated() == "SLURM_JOB_GPUS=0,1"
    environment.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert allocated() == ""
    if not torch.cuda.is_available():
        assert choose("auto").type == "cpu"


def test_a_gpu_that_cannot_be_used_is_an_error_for_people(environment: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nAbout")

    environment.setattr(torch.cuda, "device_count", lambda: 1)
    environment.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(GpuUnusable, match=r"cannot use this GPU: .* unavailable About"):
        choose("cuda:0")


# --- folders that somebody else got at -----------------------------------------------------------


def _linked(folder: Path, elsewhere: Path) -> None:
    folder.symlink_to(elsewhere)


def _a_file(folder: Path, _: Path) -> None:
    folder.write_text("")


def _open_to_all(folder: Path, _: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _of_another(folder: Path, _: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)


@pytest.mark.parametrize("make", [_linked, _a_file, _open_to_all, _of_another])
def test_only_a_folder_of_ones_own_is_used(
    tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    if make is _of_another and os.getuid():
        pytest.skip("only root gives folders away")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    make(tmp_path / "gpus", tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"gpus: .*`--device cuda:0`"):
        gpus.claim(GPUS, tmp_path / "gpus")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_lock_is_never_opened_through_a_link_nor_emptied(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "gpus"
    victim.write_text("keep this")
    folder.mkdir(mode=0o700)
    (folder / "GPU-a.0").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        gpus.claim(GPUS, folder)
    (folder / "GPU-a.0").unlink()
    os.link(victim, folder / "GPU-a.0")
    assert gpus.claim(GPUS, folder) == 0
    assert victim.read_text() == "keep this"


DETERMINISTIC = """
import os
import torch
from drama.pipeline import gpus

gpus.choose("cpu", {wanted})
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
      os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(
    ("wanted", "said"), [(True, "True False :4096:8"), (False, "False False None")]
)
def test_a_fixed_order_is_asked_for_before_cuda_is_begun(wanted: bool, said: str) -> None:
    code = DETERMINISTIC.format(wanted=wanted)
    environment = {n: v for n, v in os.environ.items() if n != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == said
