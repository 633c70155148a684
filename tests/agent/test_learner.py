"""The two updates: the same on the fast path and the plain one, and nothing asked of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drama.agent.behaviour.agent import Agent
from drama.agent.behaviour.imagination import Trajectories, imagine
from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.agent.replay.tensors import RingTensors
from drama.agent.settings import Settings
from drama.agent.training import learner as learner_module
from drama.agent.training.graphs import CALLS_BEFORE, recorder
from drama.agent.training.learner import Learner
from drama.pipeline.config import Preset
from drama.runs.metrics import BEHAVIOUR_METRICS, WORLD_MODEL_METRICS

ACTIONS, SIZE, STORED = 3, 16, 40
CPU = torch.device("cpu")


@pytest.fixture
def settings(preset: Callable[..., Preset]) -> Settings:
    changes = {
        "environment": {"image_size": SIZE},
        "world_model": {"channels": [4, 4], "strides": [2, 2], "categoricals": 3, "classes": 4},
        "sequence_model": {"width": 16, "head_width": 8},
    }
    return preset("quick", changes).settings()


def make_learner(settings: Settings, device: torch.device, *, plain: bool) -> Learner:
    """A learner over a ring of noise, the same each time."""
    torch.manual_seed(0)
    agent = Agent(settings, ACTIONS).to(device).eval()
    agent.world_model.choose_path(plain=plain)
    buffer = ReplayBuffer(STORED, (SIZE, SIZE, 3))
    generator = np.random.default_rng(0)
    for step in range(STORED):
        frame = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        buffer.append(Transition(frame, step % ACTIONS, step % 5, step % 9 == 0, False, False, 0))
    ring = RingTensors(buffer, device)
    ring.follow()
    return Learner(agent, ring, plain=plain)


def rows(batch: int, length: int, device: torch.device = CPU) -> Tensor:
    """Windows that overlap, int64 [B, L]."""
    return torch.arange(batch, device=device)[:, None] * 2 + torch.arange(length, device=device)


def learn(learner: Learner, updates: int) -> list[Tensor]:
    """Alternate updates; returns their metrics."""
    torch.manual_seed(1)
    device = learner.device
    metrics = []
    for _ in range(updates):
        metrics.append(learner.update_world_model(rows(8, 6, device), rows(8, 6, device).flip(0)))
        metrics.append(learner.update_behaviour(rows(12, 4, device)))
    return metrics


def test_metrics_are_the_named_ones_and_hold_no_gradients(settings: Settings) -> None:
    world_model, behaviour = learn(make_learner(settings, CPU, plain=False), 1)
    assert world_model.shape == (len(WORLD_MODEL_METRICS),)
    assert behaviour.shape == (len(BEHAVIOUR_METRICS),)
    assert not world_model.requires_grad and not behaviour.requires_grad
    named = dict(zip(WORLD_MODEL_METRICS, world_model.tolist(), strict=True))
    assert named["loss/reconstruction"] > 1 and named["gradient_norm/world_model"] > 0
    assert named["loss/total"] > named["loss/reconstruction"]


def test_the_fast_path_learns_what_the_plain_one_learns(settings: Settings) -> None:
    """Two updates of each kind, from the same seeds: every metric to 1e-3."""
    plain, fast = (learn(make_learner(settings, CPU, plain=p), 2) for p in (True, False))
    for expected, found in zip(plain, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_as_published_other_rewards_are_imagined(settings: Settings) -> None:
    """From the same seeds and weights; the first world-model update is the same."""
    theirs = settings.behaviour.model_copy(update={"as_published": True})
    found = [
        learn(make_learner(changed, CPU, plain=False), 1)
        for changed in (settings, settings.model_copy(update={"behaviour": theirs}))
    ]
    assert torch.equal(found[0][0], found[1][0])
    at = BEHAVIOUR_METRICS.index("imagined_reward")
    assert found[0][1][at] != found[1][1][at]


def test_the_world_model_is_trained_in_training_mode_and_left_in_the_other(
    settings: Settings,
) -> None:
    """Its batch norms take in every batch of its own updates, and none that is imagined from."""
    learner = make_learner(settings, CPU, plain=False)
    model = learner.agent.world_model
    learn(learner, 3)
    counts = [int(n) for name, n in model.named_buffers() if name.endswith("batches_tracked")]
    assert counts and set(counts) == {3}
    assert not model.training


def test_rewards_are_learned_from_the_rows_that_are_named_for_them(settings: Settings) -> None:
    """Not from those of the frames: shuffled rewards are a control only if they are learned."""
    at = WORLD_MODEL_METRICS.index("loss/reward")
    losses = []
    for reward_rows in (rows(8, 6), torch.full((8, 6), 4)):
        learner = make_learner(settings, CPU, plain=False)
        torch.manual_seed(1)
        updates = [learner.update_world_model(rows(8, 6), reward_rows) for _ in range(3)]
        losses.append([float(update[at]) for update in updates])
    assert losses[0][0] == pytest.approx(losses[1][0])  # all bins are alike at first
    assert losses[0][2] != pytest.approx(losses[1][2], rel=1e-5)


@pytest.mark.parametrize("section", ["world_model", "behaviour"])
def test_each_optimiser_has_the_settings_of_its_own_part(settings: Settings, section: str) -> None:
    """Without a rate and decay, that part stays as it was, and the other learns."""
    part = getattr(settings, section)
    still = part.optimiser.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    changed = {section: part.model_copy(update={"optimiser": still})}
    learner = make_learner(settings.model_copy(update=changed), CPU, plain=False)
    before = {name: p.detach().clone() for name, p in learner.agent.named_parameters()}
    learn(learner, 2)
    moved = {
        name.partition(".")[0]
        for name, p in learner.agent.named_parameters()
        if not torch.allclose(p, before[name], rtol=0, atol=1e-12) and "slow_critic" not in name
    }
    assert moved == {"world_model", "behaviour"} - {section}


def test_each_distinct_frame_is_encoded_once(settings: Settings) -> None:
    for plain, encoded in ((True, 12 * 4), (False, 2 * 11 + 4)):
        learner = make_learner(settings, CPU, plain=plain)
        seen: list[int] = []
        posterior = learner.agent.world_model.posterior
        learner.agent.world_model.posterior = lambda frames, posterior=posterior, seen=seen: (
            seen.append(frames[..., 0, 0, 0].numel()) or posterior(frames)
        )
        learner.update_behaviour(rows(12, 4))
        assert seen == [encoded]


@pytest.mark.parametrize("plain", [True, False])
def test_imagination_begins_from_the_contexts_that_were_drawn(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """Frames and actions of the same rows, and as many steps as the settings say."""
    given: list[Any] = []

    def watched(*arguments: Any, **more: Any) -> Trajectories:
        given[:] = arguments
        return imagine(*arguments, **more)

    monkeypatch.setattr(learner_module, "imagine", watched)
    learner, contexts = make_learner(settings, CPU, plain=plain), rows(12, 4)
    learner.update_behaviour(contexts)
    frames, actions, horizon, places = given[2:]
    ring = learner.ring.buffer.ring()
    shown = frames if plain else frames[places]
    assert np.array_equal(shown, ring["frame"][contexts])
    assert np.array_equal(actions, ring["action"][contexts])
    assert horizon == settings.behaviour.horizon


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_products_are_taken_in_the_precision_that_is_set(
    settings: Settings, precision: str
) -> None:
    """In both updates; on a CPU `auto` is float32."""
    training = settings.training.model_copy(update={"precision": precision})
    learner = make_learner(settings.model_copy(update={"training": training}), CPU, plain=False)
    seen: list[torch.dtype] = []
    for layer in (learner.agent.world_model.prior_head, learner.agent.behaviour.critic[0]):
        layer.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    learn(learner, 1)
    assert set(seen) == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


@contextmanager
def without_autocast() -> Iterator[None]:
    """There is none on the device `meta`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        yield


def test_updates_and_decisions_ask_nothing_of_the_cpu(settings: Settings) -> None:
    """Tensors on `meta` have shapes and no values: whoever looks at one fails.

    So does who mixes in a tensor made on the CPU, or lets a size depend on values. None of it could
    be recorded as a CUDA graph.
    """
    meta = torch.device("meta")
    learner = make_learner(settings, meta, plain=False)
    model, window = learner.agent.world_model, learner.agent.new_window(1)
    with without_autocast():
        assert [metrics.shape for metrics in learn(learner, 1)] == [(7,), (7,)]
        decision = learner.agent.decide(
            torch.empty(1, SIZE, SIZE, 3, dtype=torch.uint8, device=meta),
            torch.from_numpy(window.latents).to(meta),
            torch.from_numpy(window.actions).to(meta),
            torch.ones(1, dtype=torch.int64, device=meta),
            torch.empty(1, *learner.agent.noise_shape(), device=meta),
        )
    assert decision.shape == (1, 2 + model.latent_shape[0])


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cuda", False)])
def test_what_is_not_recorded_stays_as_it_is(device: str, wanted: bool) -> None:
    assert recorder(torch.device(device), wanted=wanted)(torch.sin) is torch.sin


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: PyTorch sees none")
def test_recorded_updates_learn_what_others_learn(settings: Settings) -> None:
    """As many updates as it takes to be replayed a few times, with the same random numbers."""
    device = torch.device("cuda", 0)
    every = []
    for wanted in (False, True):
        learner = make_learner(settings, device, plain=False)
        record = recorder(device, wanted=wanted)
        for name in ("update_world_model", "update_behaviour"):
            setattr(learner, name, record(getattr(learner, name)))
        every.append(learn(learner, CALLS_BEFORE + 3))
    for expected, found in zip(*every, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)  # bfloat16
