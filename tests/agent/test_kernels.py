"""Mamba-2's two backends: which one is chosen and why, and that they compute the same thing.

Everywhere, stand-ins that follow the kernels' documented interface step by step take the kernels'
place: they show that the mixer asks for the right thing. The kernels themselves run where there is
a CUDA GPU with mamba_ssm, or on a CPU where Triton's interpreter finds mamba_ssm's and
causal_conv1d's Python files: MAMBA_SKIP_CUDA_BUILD=TRUE and CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
install these, TRITON_INTERPRET=1 sets the interpreter to work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from workspace import Workspace

from drama.agent.behaviour.agent import Agent
from drama.agent.model.sequence import kernels, use_backend
from drama.agent.model.sequence.base import State
from drama.agent.model.sequence.mamba2 import Mamba2
from drama.agent.settings import SequenceModelSettings
from drama.agent.training.loop import Trainer
from drama.agent.training.runtime import Runtime
from drama.errors import ConfigurationError
from drama.pipeline import jobs
from drama.pipeline.config import Preset
from drama.pipeline.recipes import read_evaluation_recipe, read_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONVOLUTION, SCAN = kernels.MODULES
SIZES = {"width": 16, "head_width": 8, "state_size": 4, "chunk_length": 6}  # 40 channels

Load = Callable[..., Preset]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels' settings leave in the environment goes with the test."""
    for name in kernels.KERNEL_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def sizes(preset: Load) -> Callable[..., SequenceModelSettings]:
    """Settings of a sequence model, with changes over them."""
    return lambda **changes: preset("quick", {"sequence_model": SIZES | changes}).sequence_model


Sizes = Callable[..., SequenceModelSettings]

# --- which backend, and why ----------------------------------------------------------------------


def put_packages(folder: Path, monkeypatch: pytest.MonkeyPatch, scan: str) -> None:
    """Let empty causal_conv1d and mamba_ssm be found, the scan's module with some source text."""
    packages = [SCAN.rsplit(".", n)[0] for n in (3, 2, 1)]  # mamba_ssm, mamba_ssm.ops, ...
    for name in (CONVOLUTION, *packages, SCAN):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]  # what was there, or nothing, comes back after the test
    for name in packages:
        file = folder.joinpath(*name.split("."), "__init__.py")
        file.parent.mkdir()
        file.touch()
    folder.joinpath(*SCAN.split(".")).with_suffix(".py").write_text(scan)
    (folder / f"{CONVOLUTION}.py").touch()
    monkeypatch.syspath_prepend(folder)


def test_auto_takes_torch_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    """Even where the kernels load."""
    put_packages(tmp_path, monkeypatch, "")
    choice = kernels.choose("auto", CPU, sizes())
    assert str(choice) == "torch (mamba_ssm needs a CUDA GPU; the device is cpu)"
    with pytest.raises(ConfigurationError, match=r"mamba_ssm.*the device is cpu\. Use auto or"):
        kernels.choose("mamba_ssm", CPU, sizes())


def test_auto_takes_mamba_ssm_where_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    """Its settings stand before it loads, since some count only then; a person's own stay."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    put_packages(tmp_path, monkeypatch, "import os\nfound = dict(os.environ)")
    assert kernels.choose("auto", CUDA, sizes()).name == "mamba_ssm"
    assert kernels.choose("mamba_ssm", CUDA, sizes()) == kernels.Choice("mamba_ssm", "as asked")
    found = sys.modules[SCAN].found
    assert found["MAMBA_DETERMINISTIC"] == found["CAUSAL_CONV1D_DETERMINISTIC"] == "1"
    assert found["TRITON_F32_DEFAULT"] == "ieee"


@pytest.mark.parametrize("missing", kernels.MODULES)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes, missing: str
) -> None:
    put_packages(tmp_path, monkeypatch, "")
    monkeypatch.setitem(sys.modules, missing, None)
    said = rf"{missing.partition('.')[0]} does not load: ModuleNotFoundError: .*{missing}"
    choice = kernels.choose("auto", CUDA, sizes())
    assert choice.name == "torch"
    with pytest.raises(ConfigurationError, match=said) as raised:
        kernels.choose("mamba_ssm", CUDA, sizes())
    assert choice.reason in str(raised.value) and raised.value.exit_code == 2


def test_kernels_that_break_while_they_load_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    put_packages(tmp_path, monkeypatch, "raise OSError('libcudart.so.12: not found')")
    choice = kernels.choose("auto", CUDA, sizes())
    assert choice.name == "torch" and "OSError: libcudart.so.12: not found" in choice.reason


def test_what_the_kernels_cannot_compute_goes_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    put_packages(tmp_path, monkeypatch, "")
    choice = kernels.choose("auto", CUDA, sizes(state_size=3))
    assert choice.name == "torch" and "multiple of 8 channels" in choice.reason
    assert "= 38" in choice.reason
    choice = kernels.choose("mamba_ssm", CUDA, sizes(kind="gru"))
    assert choice.name == "torch" and "the sequence model is gru" in choice.reason


def test_the_plain_path_takes_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    put_packages(tmp_path, monkeypatch, "")
    runtime = Runtime(CUDA, threads=1, checkpoint_every=1, plain=True, backend="mamba_ssm")
    assert runtime.choose_backend(sizes()) == kernels.Choice("torch", "as asked")


def test_a_choice_reaches_every_mixer(preset: Load) -> None:
    agent = Agent(preset("quick", {"sequence_model": {"blocks": 3}}).settings(), actions=2)
    mixers = [module for module in agent.modules() if isinstance(module, Mamba2)]
    for name, fused in (("mamba_ssm", True), ("torch", False)):
        use_backend(agent, kernels.Choice(name, ""))
        assert [mixer.fused for mixer in mixers] == [fused] * 3


def test_training_and_evaluation_use_what_was_chosen(
    undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(undisturbed.root, tmp_path / "copy")
    monkeypatch.chdir(root)
    run = read_recipe(undisturbed.recipe.relative_to(undisturbed.root))
    evaluation = read_evaluation_recipe(run)
    evaluation.path.unlink()
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice("mamba_ssm", "a test"))
    seen: list[Agent] = []
    monkeypatch.setattr(jobs, "play_on", lambda agent, *_: seen.append(agent) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jobs.evaluate_run(run, evaluation, CPU, threads=1)
    trainer = Trainer(run.recipe, run.fingerprint, tmp_path, Runtime(CPU, 1, 1))
    trainer.environment.close()
    for agent in (*seen, trainer.agent):
        mixers = [module for module in agent.modules() if isinstance(module, Mamba2)]
        assert mixers and all(mixer.fused for mixer in mixers)


# --- the same results ----------------------------------------------------------------------------


def documented_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None
) -> Tensor:
    """What causal_conv1d_fn says it computes, for x [B, channels, L] with channels together."""
    channels, width = weight.shape
    assert x.stride(1) == 1 and channels % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    y = F.conv1d(x.float(), weight[:, None], bias, padding=width - 1, groups=channels)
    return (F.silu(y) if activation == "silu" else y)[..., : x.shape[-1]].to(x.dtype)


def documented_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Any:
    """What mamba_chunk_scan_combined says it computes, one step after the other."""
    batch, length, heads, width = x.shape
    assert dt.shape == (batch, length, heads) and B.shape == C.shape == (batch, length, 1, 4)
    assert x.dtype == B.dtype == C.dtype and chunk_size == SIZES["chunk_length"]
    h = torch.zeros(batch, heads, width, 4) if initial_states is None else initial_states
    step = dt.float() if dt_bias is None else dt.float() + dt_bias
    step = (F.softplus(step) if dt_softplus else step)[..., None, None]  # [B, L, H, 1, 1]
    outputs = []
    for t in range(length):
        added = step[:, t] * x[:, t, ..., None].float() * B[:, t, :, None].float()
        h = torch.exp(step[:, t] * A[:, None, None]) * h + added
        outputs.append((h * C[:, t, :, None].float()).sum(-1))
    y = torch.stack(outputs, 1)
    y = (y if D is None else y + D[:, None] * x).to(x.dtype)
    return (y, h) if return_final_states else y


@dataclass(frozen=True)
class Library:
    """Kernels to compare with: where they run, and the 16-bit dtype that runs there."""

    device: torch.device
    half: torch.dtype


@pytest.fixture(params=["stand-ins", "kernels"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put stand-ins in the kernels' place, or make the kernels run here."""
    if request.param == "stand-ins":
        conv = SimpleNamespace(causal_conv1d_fn=documented_convolution)
        monkeypatch.setitem(sys.modules, CONVOLUTION, conv)
        scan = SimpleNamespace(mamba_chunk_scan_combined=documented_scan)
        monkeypatch.setitem(sys.modules, SCAN, scan)
        return Library(CPU, torch.bfloat16)
    if torch.cuda.is_available():
        obstacle = kernels._obstacle(CUDA, request.getfixturevalue("sizes")())
        if obstacle:
            pytest.skip(obstacle)
        return Library(CUDA, torch.bfloat16)
    found = all(importlib.util.find_spec(name) for name in (CONVOLUTION, "mamba_ssm", "triton"))
    if not found or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA GPU, and no mamba_ssm with Triton's interpreter (TRITON_INTERPRET=1)")
    interpret(monkeypatch)
    return Library(CPU, torch.float16)  # the interpreter multiplies bfloat16's bits as integers


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mamba_ssm's kernels run on a CPU, with causal_conv1d's own reference beside them."""
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")  # trying out block sizes takes a GPU
    for compiled in ("causal_conv1d_cuda", "selective_scan_cuda"):
        monkeypatch.setitem(sys.modules, compiled, SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    one = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one)
    import causal_conv1d
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    monkeypatch.setattr(causal_conv1d, "causal_conv1d_fn", causal_conv1d_ref)


def random_mixer(settings: SequenceModelSettings, device: torch.device) -> Mamba2:
    """A mixer whose every parameter is random, so that none can go unused unnoticed."""
    mixer = Mamba2(settings)
    with torch.no_grad():
        mixer.dt_bias.add_(torch.rand_like(mixer.dt_bias))
        for parameter in (mixer.D, mixer.norm.weight):
            parameter.copy_(torch.randn_like(parameter))
    return mixer.to(device)


def random_state(mixer: Mamba2, batch: int, device: torch.device) -> State:
    empty = mixer.initial_state(batch, device)
    return {name: torch.randn_like(part).requires_grad_() for name, part in empty.items()}


def results(mixer: Mamba2, fused: bool, x: Tensor, state: State) -> dict[str, Tensor]:
    """Output, state and all gradients of a sum that weighs every number of both differently."""
    mixer.fused = fused
    y, after = mixer(x, state)
    made = {"output": y, **after}
    total = sum(
        (part * torch.linspace(-1, 1, part.numel(), device=x.device).view_as(part)).sum()
        for part in made.values()
    )
    named = dict(mixer.named_parameters()) | {"x": x} | {f"{n} before": s for n, s in state.items()}
    gradients = torch.autograd.grad(total, list(named.values()))
    return made | {f"d {name}": g for name, g in zip(named, gradients, strict=True)}


def deviations(mixer: Mamba2, x: Tensor, state: State) -> dict[str, float]:
    """The largest difference between the backends over the largest number, per result."""
    torch_results, fused_results = (results(mixer, fused, x, state) for fused in (False, True))
    deviation = {
        name: ((fused_results[name] - value).abs().max() / value.abs().max()).item()
        for name, value in torch_results.items()
    }
    print({name: f"{value:.1e}" for name, value in deviation.items()})
    return deviation


@pytest.mark.parametrize("length", [1, 3, 6, 20])
def test_backends_agree_in_float32(library: Library, sizes: Sizes, length: int) -> None:
    """From a state on, over less than a chunk, a whole one and several; gradients included."""
    mixer = random_mixer(sizes(), library.device)
    x = torch.randn(2, length, 16, device=library.device, requires_grad=True)
    deviation = deviations(mixer, x, random_state(mixer, 2, library.device))
    assert max(deviation.values()) < 2e-5, deviation


def test_backends_agree_to_the_precision_of_16_bits(library: Library, sizes: Sizes) -> None:
    """Under autocast the kernels take 16-bit factors; bfloat16's are rounded by up to 1/256."""
    mixer = random_mixer(sizes(), library.device)
    x = torch.randn(2, 20, 16, device=library.device, requires_grad=True)
    state = random_state(mixer, 2, library.device)
    with torch.autocast(library.device.type, library.half):
        mixer.fused = True
        y, after = mixer(x, state)
        deviation = deviations(mixer, x, state)
    assert y.dtype == library.half and {part.dtype for part in after.values()} == {torch.float32}
    assert max(deviation.values()) < 8 * torch.finfo(library.half).eps, deviation


@torch.no_grad()
def test_steps_go_on_from_the_fused_scan(library: Library, sizes: Sizes) -> None:
    mixer = random_mixer(sizes(), library.device)
    x = torch.randn(2, 12, 16, device=library.device)
    expected, _ = mixer(x)
    mixer.fused = True
    y, state = mixer(x[:, :10])
    torch.testing.assert_close(y, expected[:, :10], rtol=1e-5, atol=1e-5)
    for t in (10, 11):
        y_t, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y_t, expected[:, t], rtol=1e-5, atol=1e-5)
