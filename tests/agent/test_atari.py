"""The Atari100k protocol on hand-made emulator traces (the real one: test_atari_emulator.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ale_py
import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drama.agent.env.atari import Atari
from drama.agent.settings import EnvironmentSettings

SIZE = 64


def settings(**changes: Any) -> EnvironmentSettings:
    values: dict[str, Any] = {
        "action_repeat": 4,
        "image_size": SIZE,
        "max_frames": 108_000,
        "actions": "minimal",
        "repeat_action_probability": 0.0,
        "no_op_starts": 0,
        "life_loss_terminates": "learning",
    }
    return EnvironmentSettings(**(values | changes))


# A hand-made emulator: it plays a written trace and lights one pixel per raw frame, so that an
# observation tells which raw frames it was made of. Pixel 0 is the frame shown at the reset.


@dataclass
class Raw:
    """What one raw frame of the trace brings."""

    reward: int = 0
    lives: int = 3
    over: bool = False


@dataclass
class TraceEmulator:
    trace: list[Raw]
    screen_size: tuple[int, int] = (SIZE, SIZE)
    screens: list[np.ndarray] | None = None
    acted: list[int] = field(default_factory=list)
    at: int = 0

    def act(self, action: int) -> int:
        self.acted.append(action)
        self.at += 1
        return self.trace[self.at - 1].reward

    def lives(self) -> int:
        return self.trace[self.at - 1].lives if self.at else 3

    def game_over(self, *, with_truncation: bool = True) -> bool:
        return self.at > 0 and self.trace[self.at - 1].over

    def reset_game(self) -> None:
        self.at = 0

    def getMinimalActionSet(self) -> list[ale_py.Action]:
        return [ale_py.Action.NOOP, ale_py.Action.RIGHT, ale_py.Action.LEFT]  # codes 0, 3, 4

    def getLegalActionSet(self) -> list[ale_py.Action]:
        return list(ale_py.Action.__members__.values())

    def getScreenDims(self) -> tuple[int, int]:
        return self.screen_size

    def getScreenRGB(self, array: np.ndarray) -> None:
        if self.screens is not None:
            array[:] = self.screens[self.at]
        else:
            array[:] = 0
            array.reshape(-1, 3)[self.at] = (255, 128, 1)

    def cloneState(self, *, include_rng: bool = False) -> Any:
        return None

    def restoreState(self, state: object) -> None:
        raise NotImplementedError


class TraceConsole:
    def __init__(self, ale: TraceEmulator) -> None:
        self.ale = ale
        self.log: list[str] = []

    def seed_game(self, seed: int | None = None) -> None:
        self.log.append(f"seed {seed}")

    def load_game(self) -> None:
        self.log.append("load")

    def close(self) -> None:
        self.log.append("close")


def on_trace(trace: list[Raw], **changes: Any) -> tuple[Atari, TraceEmulator]:
    """A game that has just been reset, on a trace that goes on uneventfully after its last line."""
    emulator = TraceEmulator(trace + [Raw(lives=trace[-1].lives if trace else 3)] * 200)
    environment = Atari("Trace", settings(**changes), TraceConsole(emulator))
    environment.reset()
    return environment, emulator


def shown(frame: np.ndarray) -> set[int]:
    """The raw frames that an observation is made of."""
    lit = np.flatnonzero(frame.reshape(-1, 3)[:, 0])
    assert (frame.reshape(-1, 3)[lit] == (255, 128, 1)).all()
    return set(lit.tolist())


class TestRepeat:
    def test_shows_the_maximum_of_the_last_two_raw_frames(self) -> None:
        environment, emulator = on_trace([])
        assert [shown(environment.step(0)[0]) for _ in range(3)] == [{3, 4}, {7, 8}, {11, 12}]
        assert len(emulator.acted) == 12

    def test_maximum_is_taken_per_pixel_and_channel(self) -> None:
        rng = np.random.default_rng(0)
        screens = [rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8) for _ in range(5)]
        emulator = TraceEmulator([Raw()] * 4, screens=screens)
        environment = Atari("Trace", settings(), TraceConsole(emulator))
        first, _ = environment.reset()
        assert (first == screens[0]).all()
        assert (environment.step(0)[0] == np.where(screens[3] > screens[4], *screens[3:])).all()

    def test_repeat_of_one_reaches_back_to_the_step_before(self) -> None:
        environment, _ = on_trace([], action_repeat=1)
        assert [shown(environment.step(0)[0]) for _ in range(3)] == [{0, 1}, {1, 2}, {2, 3}]

    def test_reward_is_summed_and_not_clipped(self) -> None:
        environment, _ = on_trace([Raw(100), Raw(-5), Raw(300), Raw(7), Raw(1)])
        _, reward, *_ = environment.step(0)
        assert (reward, type(reward)) == (402.0, float)
        assert environment.step(0)[1] == 1.0

    def test_every_frame_gets_the_code_of_the_action(self) -> None:
        environment, emulator = on_trace([])
        environment.step(2)
        environment.step(1)
        assert emulator.acted == [4] * 4 + [3] * 4

    def test_full_action_set(self) -> None:
        environment, emulator = on_trace([], actions="full", action_repeat=1)
        assert environment.action_space.n == 18
        for action in range(18):
            environment.step(action)
        assert emulator.acted == list(range(18))

    @pytest.mark.parametrize("action", [-1, 3])
    def test_action_out_of_range_is_refused_before_anything_is_played(self, action: int) -> None:
        environment, emulator = on_trace([])
        with pytest.raises(ValueError, match=rf"action {action} .*0 to 2"):
            environment.step(action)
        assert emulator.acted == []

    def test_observations_are_the_callers_own(self) -> None:
        environment, _ = on_trace([])
        first, _ = environment.reset()
        second = environment.step(0)[0]
        environment.step(0)
        assert (shown(first), shown(second)) == ({0}, {3, 4})


class TestLifeLoss:
    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    def test_ends_the_repeat_and_not_the_game(self, at: int) -> None:
        trace = [Raw(1)] * (at - 1) + [Raw(10, lives=2)] + [Raw(100, lives=2)] * 8
        environment, emulator = on_trace(trace)
        frame, reward, terminated, truncated, info = environment.step(0)
        assert shown(frame) == {at - 1, at}
        assert reward == at - 1 + 10
        assert (terminated, truncated) == (False, False)
        assert info == {"life_lost": True, "lives": 2, "frames": at}
        assert len(emulator.acted) == at
        # The game goes on, without a reset, and the loss is told once.
        frame, reward, terminated, truncated, info = environment.step(0)
        assert shown(frame) == {at + 3, at + 4}
        assert (reward, terminated, truncated) == (400.0, False, False)
        assert info == {"life_lost": False, "lives": 2, "frames": at + 4}

    def test_on_the_first_frame_of_a_later_step_shows_the_last_of_the_one_before(self) -> None:
        environment, _ = on_trace([Raw()] * 4 + [Raw(lives=2)])
        environment.step(0)
        assert shown(environment.step(0)[0]) == {4, 5}

    def test_two_in_a_row(self) -> None:
        environment, _ = on_trace([Raw(lives=2), Raw(lives=1)])
        assert [shown(environment.step(0)[0]) for _ in range(3)] == [{0, 1}, {1, 2}, {5, 6}]

    def test_a_gained_life_does_not_hide_a_lost_one(self) -> None:
        environment, _ = on_trace([Raw(lives=4), Raw(lives=4), Raw(lives=3)])
        frame, *_, info = environment.step(0)
        assert info["life_lost"] and shown(frame) == {2, 3}

    def test_a_gained_life_is_not_a_lost_one(self) -> None:
        environment, _ = on_trace([Raw(lives=3), Raw(lives=4), Raw(lives=5), Raw(lives=5)])
        frame, *_, info = environment.step(0)
        assert info == {"life_lost": False, "lives": 5, "frames": 4} and shown(frame) == {3, 4}

    def test_lives_are_counted_anew_after_a_reset(self) -> None:
        environment, _ = on_trace([Raw(lives=0, over=True)])
        environment.step(0)
        _, info = environment.reset()
        assert info == {"life_lost": False, "lives": 3, "frames": 0}


class TestNoOpStarts:
    def test_so_many_no_ops_are_played_and_only_the_last_is_shown(self) -> None:
        """1 to 5, each of them at some reset; frame and count are those after them."""
        environment, emulator = on_trace([], no_op_starts=5)
        seen = set()
        for seed in range(40):
            emulator.acted.clear()
            frame, info = environment.reset(seed=seed)
            count = len(emulator.acted)
            assert emulator.acted == [0] * count
            assert shown(frame) == {count} and info["frames"] == count
            seen.add(count)
        assert seen == {1, 2, 3, 4, 5}

    def test_the_seed_decides_and_later_resets_continue(self) -> None:
        environment, _ = on_trace([], no_op_starts=30)

        def counts(seed: int) -> list[int]:
            infos = [environment.reset(seed=None if again else seed)[1] for again in range(6)]
            return [info["frames"] for info in infos]

        assert counts(1) == counts(1) != counts(2)
        assert len(set(counts(1))) > 2

    def test_a_life_lost_meanwhile_is_no_news(self) -> None:
        environment, _ = on_trace([Raw(), Raw(lives=2)], no_op_starts=1)
        environment.reset()
        assert environment.step(0)[4]["life_lost"] is True
        environment, emulator = on_trace([Raw(lives=2)], no_op_starts=1)
        assert environment.step(0)[4] == {"life_lost": False, "lives": 2, "frames": 5}
        assert len(emulator.acted) == 5

    def test_a_game_that_ends_meanwhile_begins_again(self) -> None:
        """Over at every second frame: none or one no-op of the last beginning is left."""
        environment, emulator = on_trace([Raw(), Raw(over=True)], no_op_starts=6)
        for seed in range(20):
            emulator.acted.clear()
            frame, info = environment.reset(seed=seed)
            count = len(emulator.acted) % 2
            assert shown(frame) == {count} and info["frames"] == count

    def test_they_count_towards_the_cap(self) -> None:
        environment, emulator = on_trace([], no_op_starts=1, max_frames=6)
        assert [environment.step(0)[3] for _ in range(2)] == [False, True]
        assert emulator.acted == [0] * 6


class TestEndOfEpisode:
    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    @pytest.mark.parametrize("lives", [0, 3])
    def test_game_over_ends_the_repeat(self, at: int, lives: int) -> None:
        environment, emulator = on_trace([Raw(1)] * (at - 1) + [Raw(10, lives, over=True)])
        frame, reward, terminated, truncated, info = environment.step(0)
        assert shown(frame) == {at - 1, at}
        assert (reward, terminated, truncated) == (at - 1 + 10, True, False)
        assert info["life_lost"] is (lives < 3)
        assert len(emulator.acted) == at

    def test_stepping_on_needs_a_reset(self) -> None:
        environment, emulator = on_trace([Raw(over=True)])
        environment.step(0)
        with pytest.raises(gymnasium.error.ResetNeeded):
            environment.step(0)
        assert len(emulator.acted) == 1
        environment.reset()
        environment.step(0)

    def test_stepping_before_the_first_reset_is_refused(self) -> None:
        environment = Atari("Trace", settings(), TraceConsole(TraceEmulator([Raw()])))
        with pytest.raises(gymnasium.error.ResetNeeded):
            environment.step(0)

    def test_truncation_at_exactly_max_frames(self) -> None:
        environment, emulator = on_trace([Raw(1)] * 20, max_frames=10)
        flags = [environment.step(0)[1:4] for _ in range(3)]
        assert flags == [(4.0, False, False), (4.0, False, False), (2.0, False, True)]
        assert len(emulator.acted) == 10
        with pytest.raises(gymnasium.error.ResetNeeded):
            environment.step(0)

    def test_truncation_counts_raw_frames_not_steps(self) -> None:
        environment, emulator = on_trace([Raw(), Raw(lives=2)], max_frames=8)
        assert [environment.step(0)[3] for _ in range(3)] == [False, False, True]
        assert len(emulator.acted) == 8

    def test_truncated_frame_is_the_maximum_of_the_last_two(self) -> None:
        environment, _ = on_trace([], max_frames=5)
        assert [shown(environment.step(0)[0]) for _ in range(2)] == [{3, 4}, {4, 5}]

    def test_game_over_on_the_last_allowed_frame_is_a_termination(self) -> None:
        environment, _ = on_trace([Raw()] * 7 + [Raw(over=True)], max_frames=8)
        environment.step(0)
        assert environment.step(0)[2:4] == (True, False)

    def test_the_count_starts_anew_with_each_episode(self) -> None:
        environment, _ = on_trace([], max_frames=8)
        for _ in range(3):
            assert [environment.step(0)[3] for _ in range(2)] == [False, True]
            environment.reset()

    def test_nothing_of_the_last_game_shows_in_the_next(self) -> None:
        environment, _ = on_trace([Raw(), Raw(), Raw(over=True)], action_repeat=1)
        while not environment.step(0)[2]:
            pass
        frame, _ = environment.reset()
        assert shown(frame) == {0}
        assert shown(environment.step(0)[0]) == {0, 1}


@given(
    events=st.lists(
        st.tuples(st.integers(-5, 300), st.sampled_from([0, 0, 0, 0, -1, 1]), st.booleans()),
        min_size=1,
        max_size=40,
    ),
    action_repeat=st.integers(1, 5),
    max_frames=st.integers(1, 50),
)
def test_any_trace_is_played_frame_by_frame(
    events: list[tuple[int, int, bool]], action_repeat: int, max_frames: int
) -> None:
    lives = 3
    trace: list[Raw] = []
    for points, change, over in events:
        lives += change
        trace.append(Raw(points, lives, over and len(trace) % 7 == 6))
    trace[-1].over = True
    emulator = TraceEmulator(trace)
    environment = Atari(
        "Trace",
        settings(action_repeat=action_repeat, max_frames=max_frames),
        TraceConsole(emulator),
    )
    environment.reset()
    before, done = 0, False
    while not done:
        frame, reward, terminated, truncated, info = environment.step(0)
        after = info["frames"]
        assert emulator.at == after and before < after <= min(before + action_repeat, max_frames)
        assert shown(frame) == {after - 1, after}
        assert reward == sum(raw.reward for raw in trace[before:after])
        assert terminated == trace[after - 1].over
        assert truncated == (after == max_frames and not terminated)
        known = [3, *(raw.lives for raw in trace)]
        losses = [known[at + 1] < known[at] for at in range(before, after)]
        assert info["life_lost"] == losses[-1] and not any(losses[:-1])
        assert not any(raw.over for raw in trace[before : after - 1])
        if after - before < action_repeat:
            assert terminated or truncated or info["life_lost"]
        before, done = after, terminated or truncated


def area_weights(source: int, target: int) -> np.ndarray:
    """Share of every source pixel in every target pixel, [target, source]."""
    edges = np.arange(target + 1) * source / target
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(overlap, 0) * target / source


@pytest.mark.parametrize(("size", "height"), [(64, 210), (64, 250), (84, 210)])
def test_resize_is_by_area(size: int, height: int) -> None:
    rng = np.random.default_rng(1)
    screen = rng.integers(256, size=(height, 160, 3), dtype=np.uint8)
    emulator = TraceEmulator([Raw()] * 4, (height, 160), [screen] * 5)
    environment = Atari("Trace", settings(image_size=size), TraceConsole(emulator))
    rows, columns = area_weights(height, size), area_weights(160, size)
    expected = np.stack([rows @ screen[..., c] @ columns.T for c in range(3)], axis=-1)
    for frame in (environment.reset()[0], environment.step(0)[0]):
        assert frame.shape == (size, size, 3) and frame.dtype == np.uint8
        assert np.abs(frame - expected).max() <= 0.51  # half a grey level of rounding


def test_seeded_once_at_the_reset_that_names_a_seed() -> None:
    console = TraceConsole(TraceEmulator([Raw(over=True)]))
    environment = Atari("Trace", settings(), console)
    environment.reset(seed=7)
    for _ in range(3):
        environment.step(0)
        environment.reset()
    assert console.log == ["seed 7", "load"]
    environment.close()
    environment.close()
    assert console.log == ["seed 7", "load", "close"]
