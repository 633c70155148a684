"""Which part of an agent fails: every stage of a run measured on what it has seen lately.

    python benchmarks/diagnosis.py results/laptop/recipes/Boxing/seed0.json

Reads the run's checkpoint and replay as they are, also while it is being trained, and changes
nothing. Everything is measured on the newest part of the replay, which today's policy played.

- reconstruction: of the pixels that move (they differ from the median picture), the share of the
  squared error that the decoder explains; 0 would be the median picture itself, 1 perfect.
- the same in open loop: latents imagined for 1, 5 and 15 steps, with the actions really taken.
- reward head: precision and recall on rewarding steps (a step counts as predicted when more than
  half the median reward is), and the sum predicted over the sum paid; with real latents, and 5
  steps into an open loop.
- termination head: precision and recall.
- KL of posterior and prior, in nats.
- entropy of the policy over that of uniform play, on imagined states.
- return scale, as the behaviour learns with it.
- rewards a step and values: paid lately, imagined by the same policy, and promised by the critic.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drama.agent.behaviour.imagination import imagine
from drama.agent.model.distributions import categorical_kl, sample_one_hot
from drama.agent.model.nets import to_pixels
from drama.agent.replay.tensors import Batch
from drama.agent.training.resumable import ResumableRun
from drama.agent.training.runtime import Runtime
from drama.errors import DramaError
from drama.pipeline.recipes import read_recipe

WINDOWS, LENGTH, CONTEXT = 64, 32, 16
RECENT = 5000
MOVING = 24 / 255
"""How far a pixel lies from the median picture to be part of something that moves."""


def main() -> None:
    """Print the measurements of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--recent", type=int, default=RECENT, help="steps of replay to look at")
    arguments = parser.parse_args()
    try:
        figures = diagnose(arguments.recipe, arguments.recent)
    except DramaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    for name, value in figures.items():
        print(f"{name:44} {value:10.4g}")


@torch.no_grad()
def diagnose(path: Path, recent: int) -> dict[str, float]:
    """Measure a run; returns each figure under its name."""
    files = read_recipe(path)
    runtime = Runtime(torch.device("cpu"), torch.get_num_threads(), None)
    run = ResumableRun(files.recipe, files.fingerprint, files.folder, runtime)
    if not run.resume():
        raise SystemExit(f"{files.folder}: there is no checkpoint here")
    torch.manual_seed(0)
    size = run.buffer.size
    generator = np.random.default_rng(0)
    starts = generator.integers(max(0, size - recent), size - LENGTH, WINDOWS)
    rows = torch.from_numpy(run.buffer.rows(starts, LENGTH))
    batch = run.ring.read(rows, rows)
    background = run.ring.frames(rows[:, 0]).float().median(0).values.byte()
    figures: dict[str, float] = {"agent steps": run.step, "episodes": run.episode}
    figures |= _world_model(run, batch, background)
    figures |= _behaviour(run, batch, recent)
    return figures


def _world_model(run: ResumableRun, batch: Batch, background: Tensor) -> dict[str, float]:
    model = run.agent.world_model
    posterior = model.posterior(batch.frames)  # [B, L, K, C]
    latents = sample_one_hot(posterior)
    d, _ = model.sequence(model.inputs(latents, batch.actions))
    prior = model.prior(d)
    found = {
        "reconstruction, moving pixels explained": _explained(
            model.decoder(latents.flatten(0, 1).flatten(1)), batch.frames, background
        ),
        "KL, nats": float(categorical_kl(posterior[:, 1:], prior[:, :-1]).mean()),
        **_outcomes("", model.reward(d), batch.rewards),
        **_flags("termination", model.terminates(d), batch.terminations),
    }
    # Open loop: real latents up to CONTEXT, the model's own from there, real actions throughout.
    past = model.inputs(latents[:, :CONTEXT], batch.actions[:, :CONTEXT])
    state, memory = model.sequence(past)
    imagined = sample_one_hot(model.prior(state[:, -1]))
    for step in range(1, LENGTH - CONTEXT):
        if step in (1, 5, 15):
            shown = batch.frames[:, CONTEXT + step - 1]
            name = f"open loop {step:2}, moving pixels explained"
            found[name] = _explained(model.decoder(imagined.flatten(1)), shown, background)
        actions = batch.actions[:, CONTEXT + step - 1]
        imagined, state, memory = model.imagine_step(imagined, actions, memory)
        if step == 5:
            paid = batch.rewards[:, CONTEXT + step - 1]
            found |= _outcomes("open loop 5, ", model.reward(state), paid)
    return found


def _explained(shown: Tensor, frames: Tensor, background: Tensor) -> float:
    """Return the share of moving pixels' squared error that a reconstruction explains."""
    real = to_pixels(frames.flatten(0, -4))  # [F, 3, S, S]
    still = to_pixels(background.unsqueeze(0))
    moving = ((real - still).abs().amax(1, keepdim=True) > MOVING).float()
    error = ((shown.float() - real).square() * moving).sum()
    unexplained = ((still - real).square() * moving).sum().clamp(min=1e-9)
    return float(1 - error / unexplained)


def _outcomes(prefix: str, predicted: Tensor, paid: Tensor) -> dict[str, float]:
    """Return how well rewards are predicted; NaN where none was paid."""
    rewarding = paid != 0
    if not rewarding.any():
        return {f"{prefix}rewarding steps": 0.0}
    typical = paid[rewarding].abs().median()
    called = predicted.abs() > typical / 2
    return {
        f"{prefix}rewarding steps": float(rewarding.sum()),
        **_flags(f"{prefix}reward", called & (predicted.sign() == paid.sign()), rewarding, called),
        f"{prefix}reward predicted over paid": float(predicted.sum() / paid.sum()),
    }


def _flags(
    name: str, right: Tensor, wanted: Tensor, called: Tensor | None = None
) -> dict[str, float]:
    called = right if called is None else called
    hits = float((right & wanted).sum())
    return {
        f"{name} precision": hits / max(1.0, float(called.sum())),
        f"{name} recall": hits / max(1.0, float(wanted.sum())),
    }


def _behaviour(run: ResumableRun, batch: Batch, recent: int) -> dict[str, float]:
    settings, agent = run.settings.behaviour, run.agent
    length = settings.context_length
    imagined = imagine(
        agent.world_model, agent.behaviour.actor.sample, batch.frames[:, :length],
        batch.actions[:, :length], settings.horizon,
    )  # fmt: skip
    log_policy = torch.log_softmax(agent.behaviour.actor(imagined.states), -1)
    entropy = float(-(log_policy.exp() * log_policy).sum(-1).mean())
    values = agent.behaviour.two_hot.decode(agent.behaviour.critic(imagined.states))
    total = run.buffer.total
    recent_rows = run.buffer.columns(max(run.buffer.first_step, total - recent), total)
    ended = recent_rows["terminated"] | recent_rows["life_lost"]
    discounted = _discounted(recent_rows["reward"], ended, settings.discount)
    return {
        "entropy over that of uniform play": entropy / math.log(agent.actions),
        "return scale": float(agent.behaviour.return_scale.average),
        "reward a step, paid lately": float(recent_rows["reward"].mean()),
        "reward a step, imagined": float(imagined.rewards.mean()),
        "discounted return, paid lately": float(discounted.mean()),
        "discounted return, critic": float(values[:, 0].mean()),
        "imagined terminations a step": float(imagined.terminations.float().mean()),
    }


def _discounted(rewards: np.ndarray, ended: np.ndarray, discount: float) -> np.ndarray:
    """Sum what follows each step, discounted, up to the end of its episode or life."""
    returns = np.zeros(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discount * (0.0 if ended[t] else following)
        returns[t] = following
    # The last ones have too little ahead of them to say anything.
    return returns[: max(1, len(returns) - int(2 / (1 - discount)))]


if __name__ == "__main__":
    main()
