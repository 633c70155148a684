"""Mamba-2: parallel scan, recurrence and a plain float64 loop compute the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drama.agent.model.sequence.mamba2 import GatedRMSNorm, Mamba2, chunked_scan
from drama.pipeline.config import Preset

Array = np.ndarray
MakeMixer = Callable[..., Mamba2]


@pytest.fixture
def make_mixer(preset: Callable[..., Preset]) -> MakeMixer:
    """A mixer whose every parameter is random, so that none can go unused unnoticed."""

    def make(chunk_length: int = 4, **changes: Any) -> Mamba2:
        sizes = {"width": 8, "head_width": 4, "state_size": 3, "chunk_length": chunk_length}
        mixer = Mamba2(preset("quick", {"sequence_model": sizes | changes}).sequence_model)
        with torch.no_grad():
            mixer.dt_bias.add_(torch.rand_like(mixer.dt_bias))
            for parameter in (mixer.D, mixer.norm.weight):
                parameter.copy_(torch.randn_like(parameter))
        return mixer

    return make


# --- references, written from the definition ----------------------------------------------------


def naive_scan(
    x: Array, dt: Array, a: Array, b: Array, c: Array, state: Array
) -> tuple[Array, Array]:
    """h_t = exp(dt A) h + dt x B^T, y_t = h C: one batch row, head and step at a time."""
    batch, length, heads, _ = x.shape
    y, state = np.zeros_like(x), state.copy()
    for n in range(batch):
        for t in range(length):
            for h in range(heads):
                decay = np.exp(dt[n, t, h] * a[h])
                added = dt[n, t, h] * np.outer(x[n, t, h], b[n, t])
                state[n, h] = decay * state[n, h] + added
                y[n, t, h] = state[n, h] @ c[n, t]
    return y, state


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def naive_mixer(mixer: Mamba2, x: Array) -> Array:
    """The whole mixer in float64, step by step: x [B, L, D] to [B, L, D]."""
    p = {name: value.detach().double().numpy() for name, value in mixer.named_parameters()}
    inner, n, heads = mixer.inner, mixer.state_size, mixer.heads
    batch, length, _ = x.shape
    projected = x @ p["in_proj.weight"].T
    gate, raw, dt = np.split(projected, [inner, inner + inner + 2 * n], -1)
    width = p["conv1d.weight"].shape[-1]
    convolved = np.zeros_like(raw)
    for t in range(length):
        convolved[:, t] = p["conv1d.bias"]
        for back in range(min(width, t + 1)):
            convolved[:, t] += p["conv1d.weight"][:, 0, width - 1 - back] * raw[:, t - back]
    convolved = silu(convolved)
    inputs = convolved[..., :inner].reshape(batch, length, heads, -1)
    b, c = convolved[..., inner : inner + n], convolved[..., inner + n :]
    step = np.log1p(np.exp(dt + p["dt_bias"]))
    start = np.zeros((batch, heads, inputs.shape[-1], n))
    y, _ = naive_scan(inputs, step, -np.exp(p["A_log"]), b, c, start)
    y = (y + p["D"][:, None] * inputs).reshape(batch, length, inner) * silu(gate)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"]
    return y @ p["out_proj.weight"].T


def scan_inputs(
    length: int, seed: int, jump: float = 0.0, sizes: tuple[int, ...] = (2, 3, 4, 5)
) -> tuple[Tensor, ...]:
    """Random scan inputs; `jump` makes one step size in eight large among small ones."""
    batch, heads, width, states = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.exp(torch.rand(batch, length, heads, generator=generator) * 4.6 - 6.9)
    dt += jump * (torch.rand(batch, length, heads, generator=generator) < 0.125)
    a = -1 - 15 * torch.rand(heads, generator=generator)
    b, c = normal(batch, length, states), normal(batch, length, states)
    x = normal(batch, length, heads, width)
    return x, dt, a, b, c, normal(batch, heads, width, states)


def assert_close(actual: Tensor, expected: Array | Tensor, relative: float = 1e-5) -> None:
    """Compare with a tolerance relative to the largest value."""
    expected = np.asarray(expected if isinstance(expected, Array) else expected.detach())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=relative * scale)


# --- the scan ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 999), st.sampled_from([0.0, 1, 20]))
def test_scan_is_the_recurrence(length: int, chunk: int, seed: int, jump: float) -> None:
    """Any length, any chunk, also when step sizes differ by four orders of magnitude."""
    inputs = scan_inputs(length, seed, jump)
    expected, expected_state = naive_scan(*(v.double().numpy() for v in inputs))
    y, state = chunked_scan(*inputs, chunk)
    assert y.dtype == state.dtype == torch.float32
    assert_close(y, expected)
    assert_close(state, expected_state)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.data(), st.integers(0, 999))
def test_scan_of_two_halves_is_the_scan(length: int, data: st.DataObject, seed: int) -> None:
    cut = data.draw(st.integers(1, length - 1))
    chunk = data.draw(st.integers(1, length))
    x, dt, a, b, c, start = scan_inputs(length, seed)
    whole, end = chunked_scan(x, dt, a, b, c, start, chunk)
    first, middle = chunked_scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], start, chunk)
    second, last = chunked_scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], middle, chunk)
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(last, end)


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
def test_scan_gradients(chunk: int) -> None:
    inputs = [v.double().requires_grad_() for v in scan_inputs(5, 0, sizes=(1, 2, 2, 3))]
    assert torch.autograd.gradcheck(lambda *args: chunked_scan(*args, chunk), inputs)


def test_strong_decay_leaves_neither_infinity_nor_nan() -> None:
    x, dt, a, b, c, state = (v.requires_grad_() for v in scan_inputs(32, 0))
    y, end = chunked_scan(x, dt * 1e4, a, b, c, state, 32)
    (y.sum() + end.sum()).backward()
    for value in (y, end, x.grad, a.grad, state.grad):
        assert value.isfinite().all()


class AllocatedNumbers(TorchDispatchMode):
    """Counts the numbers in every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.total += value.numel()
                self.largest = max(self.largest, value.numel())
        return result


def test_cost_grows_linearly_with_length() -> None:
    """Twice the length touches twice the numbers; no tensor holds a number per pair of steps."""
    totals = []
    for length in (128, 256):
        with AllocatedNumbers() as counter:
            chunked_scan(*scan_inputs(length, 0), 16)
        totals.append(counter.total)
        assert counter.largest < length * length
    assert totals[1] == pytest.approx(2 * totals[0], rel=0.02)


# --- the mixer -----------------------------------------------------------------------------------


def test_parameters_are_those_of_mamba_ssm(preset: Callable[..., Preset]) -> None:
    """Width 512, expand 2, head width 64, state size 16, convolution 4, one group."""
    mixer = Mamba2(preset("xs").sequence_model)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "in_proj.weight": (2096, 512),
        "conv1d.weight": (1056, 1, 4),
        "conv1d.bias": (1056,),
        "norm.weight": (1024,),
        "out_proj.weight": (512, 1024),
    }
    assert not dict(mixer.named_buffers())


def test_initial_values(preset: Callable[..., Preset]) -> None:
    """A uniform in [1, 16]; step sizes log-uniform in [0.001, 0.1]; D one."""
    sizes = {"width": 1024, "head_width": 1, "expand": 1}
    mixer = Mamba2(preset("quick", {"sequence_model": sizes}).sequence_model)  # 1024 heads
    a = mixer.A_log.detach().exp()
    assert 1 <= a.min() < 1.2 and 15.8 < a.max() <= 16.0001
    assert a.mean().item() == pytest.approx(8.5, abs=4 * 15 / np.sqrt(12 * 1024))
    log_dt = torch.nn.functional.softplus(mixer.dt_bias.detach()).log10()
    assert -3.0001 < log_dt.min() < -2.97 and -1.03 < log_dt.max() < -0.9999
    assert log_dt.mean().item() == pytest.approx(-2, abs=4 * 2 / np.sqrt(12 * 1024))
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()


def test_gated_norm_by_hand() -> None:
    """Gate first, then divide by the root mean square: [3, 4] * SiLU(1) has mean square 12.5."""
    norm = GatedRMSNorm(2, epsilon=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    result = norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(result, torch.tensor([3.0, 8.0]) / 12.5**0.5)
    uneven = norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(uneven, torch.tensor([0.0, 2 * 2**0.5]))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 16, 21])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_parallel_recurrent_and_naive_agree(make_mixer: MakeMixer, length: int, chunk: int) -> None:
    mixer = make_mixer(chunk)
    x = torch.randn(2, length, 8)
    expected = naive_mixer(mixer, x.double().numpy())
    parallel, after = mixer(x)
    assert_close(parallel, expected)
    state = mixer.initial_state(2, x.device)
    steps = []
    for t in range(length):
        y, state = mixer.step(x[:, t], state)
        steps.append(y)
    assert_close(torch.stack(steps, 1), expected)
    assert after.keys() == state.keys()
    for name in state:
        assert_close(after[name], state[name])


@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_width(make_mixer: MakeMixer, width: int) -> None:
    mixer = make_mixer(convolution_width=width)
    x = torch.randn(2, 9, 8)
    assert_close(mixer(x)[0], naive_mixer(mixer, x.double().numpy()))


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_going_on_from_a_state(make_mixer: MakeMixer, cut: int) -> None:
    """Also from a sequence shorter than the convolution; in parallel or by steps."""
    mixer = make_mixer()
    x = torch.randn(3, 9, 8)
    whole, end = mixer(x)
    first, state = mixer(x[:, :cut])
    kept = {name: value.clone() for name, value in state.items()}
    second, last = mixer(x[:, cut:], state)
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(last["scan"], end["scan"])
    stepped, _ = mixer.step(x[:, cut], state)
    assert_close(stepped, whole[:, cut])
    for name, value in state.items():
        assert torch.equal(value, kept[name]), "a state that was handed out must not change"


def test_gradients_of_both_forms_agree(make_mixer: MakeMixer) -> None:
    mixer = make_mixer()
    x = torch.randn(2, 7, 8)
    weights = torch.randn(2, 7, 8)
    parallel = torch.autograd.grad((mixer(x)[0] * weights).sum(), list(mixer.parameters()))
    state, total = mixer.initial_state(2, x.device), torch.zeros(())
    for t in range(7):
        y, state = mixer.step(x[:, t], state)
        total = total + (y * weights[:, t]).sum()
    for one, other in zip(
        parallel, torch.autograd.grad(total, list(mixer.parameters())), strict=True
    ):
        assert_close(one, other, 1e-4)


def test_the_future_does_not_change_the_past(make_mixer: MakeMixer) -> None:
    mixer = make_mixer()
    x = torch.randn(1, 12, 8)
    base = mixer(x)[0]
    for t in range(12):
        changed = x.clone()
        changed[:, t] += 1
        moved = (mixer(changed)[0] != base).any(-1)[0]
        assert not moved[:t].any() and moved[t:].all()


def test_batch_rows_do_not_mix(make_mixer: MakeMixer) -> None:
    mixer = make_mixer()
    x = torch.randn(3, 6, 8)
    for row in range(3):
        assert_close(mixer(x[row : row + 1])[0], mixer(x)[0][row : row + 1])


def test_the_recurrence_stays_in_float32_under_autocast(make_mixer: MakeMixer) -> None:
    """With projections that bfloat16 holds exactly, nothing else may lose digits."""
    mixer = make_mixer()
    with torch.no_grad():
        mixer.in_proj.weight.copy_(mixer.in_proj.weight.bfloat16().float())
    x = torch.eye(8)[:3]  # one-hot: the projection is a column of weights
    exact = coarse = mixer.initial_state(3, x.device)
    for _ in range(6):
        _, exact = mixer.step(x, exact)
        with torch.autocast("cpu", torch.bfloat16):
            _, coarse = mixer.step(x, coarse)
    for name in exact:
        assert coarse[name].dtype == torch.float32
        assert_close(coarse[name], exact[name], 1e-6)


def test_state_shapes(make_mixer: MakeMixer) -> None:
    mixer = make_mixer()
    shapes = {name: tuple(v.shape) for name, v in mixer(torch.randn(5, 2, 8))[1].items()}
    assert shapes == {"convolution": (5, 3, 22), "scan": (5, 4, 4, 3)}
    initial = mixer.initial_state(5, torch.device("cpu"))
    assert {name: tuple(v.shape) for name, v in initial.items()} == shapes
