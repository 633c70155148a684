"""What every sequence model promises, and each one against a plain float64 reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drama.agent.model.sequence import SequenceModel, State, build
from drama.agent.model.sequence.base import Mixer
from drama.agent.model.sequence.gru import GRU
from drama.agent.model.sequence.mamba import Mamba, selective_scan
from drama.agent.model.sequence.rwkv import ChannelMixing, TimeMixing, chunked_wkv
from drama.agent.model.sequence.transformer import CONTEXT, MLP, Attention
from drama.agent.model.world_model import WorldModel
from drama.agent.settings import Recipe, SequenceModelSettings
from drama.agent.training.loop import train
from drama.agent.training.runtime import Runtime
from drama.pipeline.config import Preset
from drama.pipeline.config import load_preset as load
from drama.pipeline.layers import Layer
from drama.runs.checkpoint import load_checkpoint
from drama.runs.folder import CHECKPOINT

Array = np.ndarray

KINDS: tuple[str, ...] = get_args(SequenceModelSettings.model_fields["kind"].annotation)
PRESETS = Path(__file__).resolve().parents[2] / "config" / "presets"
QUICK = load("quick", folder=PRESETS)
CPU = torch.device("cpu")
INPUTS = 5  # width of what goes in
WIDTH = 16  # D


def model_settings(**changes: Any) -> SequenceModelSettings:
    sizes = {"width": WIDTH, "head_width": 8, "state_size": 3, "chunk_length": 4}
    return SequenceModelSettings.model_validate(QUICK.sequence_model.model_dump() | sizes | changes)


def shaken(module: nn.Module) -> Any:
    """Move every parameter at random, so that none can go unused unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def make_model(kind: str, **changes: Any) -> SequenceModel:
    return shaken(build(INPUTS, model_settings(kind=kind, **changes)))


def walk(model: SequenceModel | Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Step along x [B, L, ...] from a state."""
    outputs = []
    for x_t in x.unbind(1):
        y, state = model.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def assert_close(actual: Tensor, expected: Array | Tensor, relative: float = 1e-5) -> None:
    """Compare with a tolerance relative to the largest value."""
    expected = expected if isinstance(expected, Array) else expected.detach().numpy()
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=relative * scale)


def assert_states_close(actual: list[State], expected: list[State]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])


BUILT = """
import sys
import torch
from drama.agent.behaviour.agent import Agent
from drama.pipeline.config import load_preset

settings = load_preset("quick")
for kind in sys.argv[1:]:
    changed = settings.sequence_model.model_copy(update={"kind": kind})
    with torch.device("meta"):
        agent = Agent(settings.model_copy(update={"sequence_model": changed}), 4)
    assert all(tensor.is_meta for tensor in agent.state_dict().values()), kind
    assert "torch._dynamo" not in sys.modules, kind
"""


def test_shapes_are_known_without_memory_and_without_pytorchs_compiler() -> None:
    """Every command that loads an agent builds one so, to hold the file's tensors to."""
    subprocess.run([sys.executable, "-c", BUILT, *KINDS], check=True)


# --- laws that hold for every kind ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 24), chunk=st.integers(1, 30), cut=st.data())
def test_parallel_is_step_by_step_however_it_is_cut(
    kind: str, length: int, chunk: int, cut: st.DataObject
) -> None:
    # The same numbers for each example: a norm magnifies rounding where a head's variance is small.
    torch.manual_seed(0)
    model = make_model(kind, chunk_length=chunk)
    x = torch.randn(2, length, INPUTS)
    whole, end = model(x)
    assert whole.shape == (2, length, WIDTH)
    stepped, last = walk(model, x, model.initial_states(2, CPU))
    assert_close(stepped, whole)
    assert_states_close(last, end)
    first = cut.draw(st.integers(1, length))
    before, middle = model(x[:, :first])
    kept = [{name: value.clone() for name, value in state.items()} for state in middle]
    if first < length:
        after, last = model(x[:, first:], middle)
        assert_close(torch.cat([before, after], 1), whole)
        assert_states_close(last, end)
        assert_close(walk(model, x[:, first:], middle)[0], whole[:, first:])
    for state, copy in zip(middle, kept, strict=True):
        for name, value in state.items():
            assert torch.equal(value, copy[name]), "a state that was handed out must not change"


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_state_is_the_default(kind: str) -> None:
    model = make_model(kind)
    x = torch.randn(2, 6, INPUTS)
    assert torch.equal(model(x)[0], model(x, model.initial_states(2, CPU))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_does_not_change_the_past(kind: str) -> None:
    model = make_model(kind)
    x = torch.randn(1, 11, INPUTS)
    base = model(x)[0]
    for t in range(11):
        changed = x.clone()
        changed[:, t] += 1
        moved = ((model(changed)[0] - base).abs() > 1e-6).any(-1)[0]
        assert not moved[:t].any() and moved[t:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_rows_do_not_mix(kind: str) -> None:
    model = make_model(kind)
    x = torch.randn(3, 6, INPUTS)
    whole, states = model(x)
    following = model.step(x[:, 0], states)[0]
    for row in range(3):
        own = [{name: value[row : row + 1] for name, value in state.items()} for state in states]
        assert_close(model(x[row : row + 1])[0], whole[row : row + 1])
        assert_close(model.step(x[row : row + 1, 0], own)[0], following[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_agree_with_those_of_steps(kind: str) -> None:
    model = make_model(kind)
    x, weights = torch.randn(2, 7, INPUTS), torch.randn(2, 7, WIDTH)
    names, parameters = zip(*model.named_parameters(), strict=True)
    parallel = torch.autograd.grad((model(x)[0] * weights).sum(), parameters)
    stepped, _ = walk(model, x, model.initial_states(2, CPU))
    recurrent = torch.autograd.grad((stepped * weights).sum(), parameters)
    for name, one, other in zip(names, parallel, recurrent, strict=True):
        assert one.isfinite().all() and one.abs().max() > 0, name
        assert_close(
            one, other, 1e-3
        )  # a head's norm magnifies rounding where its variance is small


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_from_the_start(kind: str) -> None:
    """As initialised, not shaken; the world model's other parts included."""
    quick = load("quick", Layer("test", {"sequence_model": {"kind": kind}}), folder=PRESETS)
    model = WorldModel(quick.settings(), actions=3)
    nn.init.normal_(model.reward_head[-1].weight)  # zero at first: it would stop its own gradients
    frames = torch.randint(0, 256, (2, 6, 64, 64, 3), dtype=torch.uint8)
    losses = model.loss(
        frames, torch.randint(0, 3, (2, 6)), torch.randn(2, 6), torch.rand(2, 6) < 0.2
    )
    losses.total.backward()
    assert losses.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_named_tensors_batch_first(kind: str) -> None:
    model = make_model(kind)
    initial = model.initial_states(3, CPU)
    assert len(initial) == len(model.mixers)
    for before, after in zip(initial, model(torch.randn(3, 2, INPUTS))[1], strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            steps = (2,) if name in ("keys", "values") else value.shape[1:2]  # those grow
            assert after[name].shape == (3, *steps, *value.shape[2:])
            assert value.dtype == after[name].dtype == torch.float32
            assert not value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_joins_the_residual_shrinks_with_depth(kind: str) -> None:
    """Output projections: PyTorch's default, uniform, over the root of the number of mixers."""
    model = build(INPUTS, model_settings(kind=kind, blocks=3, width=32))
    assert len(model.mixers) == (6 if kind in ("transformer", "rwkv") else 3)
    for mixer in model.mixers:
        assert hasattr(mixer, "out_proj") == (kind != "gru")
        if kind != "gru":
            limit = (mixer.out_proj.in_features * len(model.mixers)) ** -0.5
            assert 0.9 * limit < mixer.out_proj.weight.abs().max() <= 1.0001 * limit


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_changes_little(kind: str) -> None:
    model = build(INPUTS, model_settings(kind=kind)).eval()
    x = torch.randn(2, 9, INPUTS)
    exact, exact_states = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        coarse, states = model(x)
        following, _ = model.step(x[:, 0], states)
    assert coarse.dtype == following.dtype == torch.float32
    assert_close(coarse, exact, 0.05)
    assert_close(following, model.step(x[:, 0], exact_states)[0], 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loop_takes_two_updates(kind: str, tmp_path: Path) -> None:
    changes = {
        "sequence_model": {"kind": kind},
        "training": {
            "total_steps": 22, "random_steps": 21, "world_model_every": 1,
            "behaviour_every": 1, "log_every": 1,
        },
    }  # fmt: skip
    quick = load("quick", Layer("test", changes), folder=PRESETS).settings()
    recipe = Recipe(
        format=1, preset="quick", game="Catch8", seed=0, settings=quick, code="", runtime=""
    )
    status = train(recipe, "f" * 64, tmp_path, Runtime(CPU, threads=1, checkpoint_every=1000))
    assert (status.state, status.step) == ("done", 22)
    saved = load_checkpoint(tmp_path / CHECKPOINT, "f" * 64)
    for optimiser in ("world_model_optimiser", "behaviour_optimiser"):
        assert saved[optimiser]["updates"] == 2
    weights = [v for name, v in saved["agent"].items() if name.startswith("world_model.sequence.")]
    assert weights and all(np.isfinite(value).all() for value in weights)


# --- references, written from the definitions ----------------------------------------------------


def weights_of(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def naive_attention(mixer: Attention, x: Array) -> Array:
    """One row, step, head and earlier step at a time; positions turn complex numbers."""
    p = weights_of(mixer)
    batch, length, width = x.shape
    heads, size = mixer.heads, mixer.head_width
    q, k, v = (
        part.reshape(batch, length, heads, size)
        for part in np.split(x @ p["qkv_proj.weight"].T, 3, -1)
    )
    frequencies = 10_000.0 ** (-2 * np.arange(size // 2) / size)

    def turned(y: Array, t: int) -> Array:
        return (y[: size // 2] + 1j * y[size // 2 :]) * np.exp(1j * t * frequencies)

    mixed = np.zeros((batch, length, heads, size))
    for n, t, h in np.ndindex(batch, length, heads):
        seen = range(max(0, t - mixer.context + 1), t + 1)
        query = turned(q[n, t, h], t)
        scores = np.array([(query * turned(k[n, s, h], s).conj()).real.sum() for s in seen])
        shares = np.exp(scores / np.sqrt(size))
        mixed[n, t, h] = shares / shares.sum() @ v[n, list(seen), h]
    return mixed.reshape(batch, length, width) @ p["out_proj.weight"].T


def naive_gru(mixer: GRU, x: Array) -> Array:
    p = weights_of(mixer.gru)
    h, outputs = np.zeros((x.shape[0], x.shape[2])), []
    for t in range(x.shape[1]):
        given = np.split(x[:, t] @ p["weight_ih_l0"].T + p["bias_ih_l0"], 3, -1)
        recalled = np.split(h @ p["weight_hh_l0"].T + p["bias_hh_l0"], 3, -1)
        reset, update = (sigmoid(given[i] + recalled[i]) for i in range(2))
        h = (1 - update) * np.tanh(given[2] + reset * recalled[2]) + update * h
        outputs.append(h)
    return np.stack(outputs, 1)


def naive_selective_scan(
    x: Array, dt: Array, a: Array, b: Array, c: Array, state: Array
) -> tuple[Array, Array]:
    """One row, step and channel at a time."""
    y, h = np.zeros_like(x), state.copy()
    for n, t, e in np.ndindex(*x.shape):
        h[n, e] = np.exp(dt[n, t, e] * a[e]) * h[n, e] + dt[n, t, e] * x[n, t, e] * b[n, t]
        y[n, t, e] = h[n, e] @ c[n, t]
    return y, h


def naive_mamba(mixer: Mamba, x: Array) -> Array:
    p = weights_of(mixer)
    inner, states, rank = mixer.inner, mixer.state_size, mixer.rank
    raw, gate = np.split(x @ p["in_proj.weight"].T, 2, -1)
    width = p["conv1d.weight"].shape[-1]
    convolved = np.zeros_like(raw)
    for t in range(raw.shape[1]):
        convolved[:, t] = p["conv1d.bias"]
        for back in range(min(width, t + 1)):
            convolved[:, t] += p["conv1d.weight"][:, 0, width - 1 - back] * raw[:, t - back]
    inputs = silu(convolved)
    low_rank, b, c = np.split(inputs @ p["x_proj.weight"].T, [rank, rank + states], -1)
    dt = np.log1p(np.exp(low_rank @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
    start = np.zeros((x.shape[0], inner, states))
    y, _ = naive_selective_scan(inputs, dt, -np.exp(p["A_log"]), b, c, start)
    return ((y + p["D"] * inputs) * silu(gate)) @ p["out_proj.weight"].T


def naive_wkv(
    r: Array, k: Array, v: Array, log_w: Array, u: Array, state: Array
) -> tuple[Array, Array]:
    """One row, step and head at a time."""
    y, s = np.zeros_like(r), state.copy()
    for n, t, h in np.ndindex(*r.shape[:3]):
        added = np.outer(k[n, t, h], v[n, t, h])
        y[n, t, h] = r[n, t, h] @ (s[n, h] + np.diag(u[h]) @ added)
        s[n, h] = np.diag(np.exp(log_w[n, t, h])) @ s[n, h] + added
    return y, s


def previous_steps(x: Array) -> Array:
    return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)


def naive_time_mixing(mixer: TimeMixing, x: Array) -> Array:
    """Shifted inputs come in the order r, k, v, gate, decay."""
    p = weights_of(mixer)
    batch, length, width = x.shape
    heads = (batch, length, mixer.heads, mixer.head_width)
    delta = previous_steps(x) - x
    low_rank = np.tanh((x + delta * p["shift_base"]) @ p["shift_down"])
    inputs = [
        x + delta * (p["shift"][i] + part @ p["shift_up"][i])
        for i, part in enumerate(np.split(low_rank, 5, -1))
    ]
    names = ("receptance", "key", "value", "gate")
    r, k, v, gate = (inputs[i] @ p[f"{name}.weight"].T for i, name in enumerate(names))
    decay = p["decay"] + np.tanh(inputs[4] @ p["decay_down"]) @ p["decay_up"]
    start = np.zeros((batch, mixer.heads, mixer.head_width, mixer.head_width))
    parts = (part.reshape(heads) for part in (r, k, v, -np.exp(decay)))
    y, _ = naive_wkv(*parts, p["bonus"], start)
    variance = y.var(-1, keepdims=True) + mixer.head_width * 1e-5
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(variance)
    y = y.reshape(batch, length, width) * p["norm.weight"] + p["norm.bias"]
    return (y * silu(gate)) @ p["out_proj.weight"].T


def naive_channel_mixing(mixer: ChannelMixing, x: Array) -> Array:
    p = weights_of(mixer)
    delta = previous_steps(x) - x
    key = (x + delta * p["shift_key"]) @ p["key.weight"].T
    gate = sigmoid((x + delta * p["shift_receptance"]) @ p["receptance.weight"].T)
    return gate * (np.maximum(key, 0) ** 2 @ p["out_proj.weight"].T)


def naive_mlp(mixer: MLP, x: Array) -> Array:
    p = weights_of(mixer)
    hidden = torch.from_numpy(x @ p["in_proj.weight"].T + p["in_proj.bias"])
    normal = torch.special.ndtr(hidden)  # GELU: x times the chance that a normal draw is below x
    return (hidden * normal).numpy() @ p["out_proj.weight"].T + p["out_proj.bias"]


REFERENCES: list[tuple[type[Mixer], Callable[[Any, Array], Array]]] = [
    (Attention, naive_attention),
    (MLP, naive_mlp),
    (GRU, naive_gru),
    (Mamba, naive_mamba),
    (TimeMixing, naive_time_mixing),
    (ChannelMixing, naive_channel_mixing),
]


@pytest.mark.parametrize(("mixer", "reference"), REFERENCES, ids=lambda v: v.__name__)
@pytest.mark.parametrize("length", [1, 2, 5, 19])
def test_mixers_are_their_definitions(
    mixer: type[Mixer], reference: Callable[[Any, Array], Array], length: int
) -> None:
    made = shaken(mixer(model_settings(kind="mamba2")))
    x = torch.randn(2, length, WIDTH)
    expected = reference(made, x.double().numpy())
    assert_close(made(x)[0], expected)
    assert_close(walk(made, x, made.initial_state(2, CPU))[0], expected)


# --- transformer ---------------------------------------------------------------------------------


def attention(context: int) -> Attention:
    return shaken(Attention(model_settings(kind="transformer"), context))


def test_attention_averages_what_it_cannot_tell_apart() -> None:
    """With keys of zero every step weighs the same: running means of the values."""
    mixer = attention(CONTEXT)
    with torch.no_grad():
        mixer.qkv_proj.weight[WIDTH : 2 * WIDTH] = 0  # keys
    x = torch.randn(2, 9, WIDTH)
    values = x @ mixer.qkv_proj.weight[2 * WIDTH :].T
    means = values.cumsum(1) / torch.arange(1, 10)[:, None]
    assert_close(mixer(x)[0], means @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("context", [1, 2, 5])
@pytest.mark.parametrize("cut", [1, 4, 5, 12])
def test_attention_sees_its_context_and_no_further(context: int, cut: int) -> None:
    mixer = attention(context)
    x = torch.randn(1, 17, WIDTH)
    expected = naive_attention(mixer, x.double().numpy())
    assert_close(mixer(x)[0], expected)
    first, state = mixer(x[:, :cut])
    assert_close(torch.cat([first, mixer(x[:, cut:], state)[0]], 1), expected)
    assert_close(walk(mixer, x, mixer.initial_state(1, CPU))[0], expected)
    changed = x.clone()
    changed[:, 3] += 1
    moved = ((mixer(changed)[0] - mixer(x)[0]).abs() > 1e-6).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(3, 3 + context))


def test_an_endless_recurrence_neither_grows_nor_drifts() -> None:
    """After 1000 steps: what the last five steps alone give, from a state of four."""
    mixer = attention(5)
    x = torch.randn(1, 1000, WIDTH)
    y, state = walk(mixer, x, mixer.initial_state(1, CPU))
    assert {name: tuple(v.shape) for name, v in state.items()} == {
        "keys": (1, 4, 2, 8),
        "values": (1, 4, 2, 8),
    }
    assert_close(y[:, -1:], mixer(x[:, -5:])[0][:, -1:])


def test_the_context_covers_the_longest_published_training_window() -> None:
    assert CONTEXT == 2048
    assert Attention(model_settings(kind="transformer")).context == CONTEXT


# --- mamba ---------------------------------------------------------------------------------------


def scan_inputs(length: int, seed: int, jump: float = 0.0) -> tuple[Tensor, ...]:
    """Random inputs of the selective scan; `jump` makes one step size in eight large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.exp(torch.rand(2, length, 3, generator=generator) * 4.6 - 6.9)  # [0.001, 0.1]
    dt += jump * (torch.rand(2, length, 3, generator=generator) < 0.125)
    a = -1 - 15 * torch.rand(3, 4, generator=generator)
    b, c = normal(2, length, 4), normal(2, length, 4)
    return normal(2, length, 3), dt, a, b, c, normal(2, 3, 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 999), st.sampled_from([0.0, 1, 20]))
def test_selective_scan_is_the_recurrence(length: int, chunk: int, seed: int, jump: float) -> None:
    inputs = scan_inputs(length, seed, jump)
    expected, expected_state = naive_selective_scan(*(v.double().numpy() for v in inputs))
    y, state = selective_scan(*inputs, chunk)
    assert_close(y, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_selective_scan_gradients(chunk: int) -> None:
    inputs = [v.double().requires_grad_() for v in scan_inputs(5, 0)]
    assert torch.autograd.gradcheck(
        lambda *args: selective_scan(*args, chunk), inputs, fast_mode=True
    )


def test_mambas_parameters_are_those_of_mamba_ssm(preset: Callable[..., Preset]) -> None:
    """Width 512, expand 2, state size 16, convolution 4, rank 512 / 16."""
    mixer = Mamba(preset("xs").sequence_model)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "A_log": (1024, 16),
        "D": (1024,),
        "in_proj.weight": (2048, 512),
        "conv1d.weight": (1024, 1, 4),
        "conv1d.bias": (1024,),
        "x_proj.weight": (64, 1024),
        "dt_proj.weight": (1024, 32),
        "dt_proj.bias": (1024,),
        "out_proj.weight": (512, 1024),
    }


def test_mambas_initial_values(preset: Callable[..., Preset]) -> None:
    """A = -1 ... -N for every channel; step sizes log-uniform in [0.001, 0.1]; D one."""
    mixer = Mamba(preset("xs").sequence_model)
    assert_close(mixer.A_log.exp(), np.tile(np.arange(1.0, 17.0), (1024, 1)))
    log_dt = nn.functional.softplus(mixer.dt_proj.bias.detach()).log10()
    assert -3.0001 < log_dt.min() < -2.97 and -1.03 < log_dt.max() < -0.9999
    assert (mixer.D == 1).all()


# --- rwkv ----------------------------------------------------------------------------------------


def wkv_inputs(length: int, seed: int, jump: float = 0.0) -> tuple[Tensor, ...]:
    """Random inputs of the linear attention; `jump` makes one decay in eight strong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    r, k, v = (normal(2, length, 2, 3) for _ in range(3))
    decay = torch.rand(2, length, 2, 3, generator=generator) * 5 - 6  # [-6, -1]
    decay += jump * (torch.rand(2, length, 2, 3, generator=generator) < 0.125)
    return r, k, v, -decay.exp(), normal(2, 3), normal(2, 2, 3, 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 999), st.sampled_from([0.0, 4, 12]))
def test_chunked_wkv_is_the_recurrence(length: int, chunk: int, seed: int, jump: float) -> None:
    """Also right after decays that leave nothing: e^(-e^11)."""
    inputs = wkv_inputs(length, seed, jump)
    expected, expected_state = naive_wkv(*(v.double().numpy() for v in inputs))
    y, state = chunked_wkv(*inputs, chunk)
    assert_close(y, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_wkv_gradients(chunk: int) -> None:
    inputs = [v.double().requires_grad_() for v in wkv_inputs(5, 0)]
    assert torch.autograd.gradcheck(lambda *args: chunked_wkv(*args, chunk), inputs, fast_mode=True)


def test_wkv_by_hand() -> None:
    """One channel, decay 1/2, u = 3, k = r = 1: y = 3v, then v1 + 3v2, then v1/2 + v2 + 3v3."""
    one = torch.ones(1, 3, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    log_w = torch.full_like(one, 0.5).log()
    u, start = torch.tensor([[3.0]]), torch.zeros(1, 1, 1, 1)
    y, state = chunked_wkv(one, one, v, log_w, u, start, 2)
    torch.testing.assert_close(y.flatten(), torch.tensor([3.0, 31.0, 310.5]))
    assert state.item() == pytest.approx(0.25 + 5 + 100)
