"""Catch: its geometry and rules, worked by hand, and what play is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.agent.env import make
from drama.agent.env.catch import OBJECT_COLOUR, PADDLE_COLOUR, STEPS, Catch
from drama.agent.settings import EnvironmentSettings
from drama.errors import ConfigurationError

LEFT, STAY, RIGHT = 0, 1, 2


def environment_settings(**changes: Any) -> EnvironmentSettings:
    values: dict[str, Any] = {
        "action_repeat": 4,
        "image_size": 64,
        "max_frames": 108_000,
        "actions": "minimal",
        "repeat_action_probability": 0.0,
        "no_op_starts": 0,
        "life_loss_terminates": "learning",
    }
    return EnvironmentSettings(**(values | changes))


@pytest.mark.parametrize(("name", "value"), [("repeat_action_probability", 0.25),
                                             ("no_op_starts", 30)])  # fmt: skip
def test_what_belongs_to_atari_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"Catch8.*environment\.{name} is {value}.*0"):
        make("Catch8", environment_settings(**{name: value}))


def box(frame: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is painted in one colour, in pixels."""
    rows, columns = np.nonzero((frame == colour).all(-1))
    left, top = int(columns.min()), int(rows.min())
    width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
    assert len(rows) == width * height  # a full rectangle
    return left, top, width, height


def started(columns: int, column: int, paddle: int) -> tuple[Catch, np.ndarray]:
    """A game that starts with the object and the paddle's left end in given columns."""
    environment = Catch(columns)
    for seed in range(10_000):
        frame, _ = environment.reset(seed=seed)
        places = box(frame, OBJECT_COLOUR)[0], box(frame, PADDLE_COLOUR)[0]
        if places == (column * 64 // columns, paddle * 64 // columns):
            return environment, frame
    raise AssertionError("no such start")


def chase(frame: np.ndarray) -> int:
    """The scripted player: bring the paddle's middle under the object, looking at pixels only."""
    left, _, width, _ = box(frame, OBJECT_COLOUR)
    paddle_left, _, paddle_width, _ = box(frame, PADDLE_COLOUR)
    return 1 + int(np.sign((left + width / 2) - (paddle_left + paddle_width / 2)))


@pytest.mark.parametrize(("columns", "size"), [(8, 8), (16, 4)])
def test_a_whole_episode_drawn(columns: int, size: int) -> None:
    environment, frame = started(columns, column=columns - 1, paddle=0)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
    assert box(frame, OBJECT_COLOUR) == (64 - size, 0, size, size)
    assert box(frame, PADDLE_COLOUR) == (0, 60, 3 * size, 4)
    for step in range(1, 16):
        frame, reward, terminated, truncated, info = environment.step(STAY)
        height = min(size, 64 - 4 * step)  # what the screen's lower edge leaves of it
        assert box(frame, OBJECT_COLOUR) == (64 - size, 4 * step, size, height)
        assert box(frame, PADDLE_COLOUR) == (0, 60, 3 * size, 4)
        assert (reward, terminated) == ((-1.0, True) if step == 15 else (0.0, False))
        assert truncated is False and info == {"life_lost": False}
    assert step == STEPS


@pytest.mark.parametrize(("columns", "size"), [(8, 8), (16, 4)])
def test_the_paddle_moves_by_columns_and_stays_on_the_screen(columns: int, size: int) -> None:
    environment, _ = started(columns, column=0, paddle=1)

    def places(actions: list[int]) -> list[int]:
        return [box(environment.step(action)[0], PADDLE_COLOUR)[0] for action in actions]

    assert places([LEFT, LEFT, LEFT, STAY, RIGHT, RIGHT]) == [0, 0, 0, 0, size, 2 * size]
    environment, _ = started(columns, column=0, paddle=columns - 4)
    right = 64 - 3 * size
    assert places([RIGHT, RIGHT, STAY, LEFT]) == [right, right, right, right - size]


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize(("offset", "reward"), [(-1, -1), (0, 1), (1, 1), (2, 1), (3, -1)])
def test_caught_when_over_the_paddle(columns: int, offset: int, reward: int) -> None:
    environment, _ = started(columns, column=3 + offset, paddle=3)
    assert [environment.step(STAY)[1] for _ in range(15)] == [0.0] * 14 + [float(reward)]


@pytest.mark.parametrize(("paddle", "action", "reward"), [(2, LEFT, 1), (1, RIGHT, -1)])
def test_the_last_move_counts(paddle: int, action: int, reward: int) -> None:
    environment, _ = started(8, column=1, paddle=paddle)
    for _ in range(14):
        environment.step(STAY)
    assert environment.step(action)[1] == reward


def test_an_object_caught_hides_a_part_of_the_paddle() -> None:
    environment, _ = started(8, column=3, paddle=3)
    for _ in range(15):
        frame, *_ = environment.step(STAY)
    assert box(frame, OBJECT_COLOUR) == (24, 60, 8, 4)
    assert box(frame, PADDLE_COLOUR) == (32, 60, 16, 4)


@pytest.mark.parametrize("columns", [8, 16])
def test_a_scripted_player_always_wins(columns: int) -> None:
    environment = Catch(columns)
    frame, _ = environment.reset(seed=0)
    for _ in range(150):
        for _ in range(14):
            frame = environment.step(chase(frame))[0]
        assert environment.step(STAY)[1] == 1.0
        frame, _ = environment.reset()


@pytest.mark.parametrize(("columns", "expected"), [(8, -0.25), (16, -0.625)])
def test_random_play(columns: int, expected: float) -> None:
    environment = Catch(columns)
    environment._frame = lambda: np.zeros((64, 64, 3), np.uint8)  # type: ignore[method-assign]
    environment.reset(seed=1)
    episodes = 20_000
    total = 0.0
    for actions in np.random.default_rng(2).integers(3, size=(episodes, STEPS)).tolist():
        for action in actions:
            total += environment.step(action)[1]
        environment.reset()
    standard_error = np.sqrt((1 - expected**2) / episodes)
    assert abs(total / episodes - expected) < 4 * standard_error


@pytest.mark.parametrize("columns", [8, 16])
def test_starts_cover_every_place_evenly(columns: int) -> None:
    environment = Catch(columns)
    environment.reset(seed=0)
    starts = np.zeros((columns, columns - 2))
    for _ in range(8000):
        environment.reset()
        starts[environment._column, environment._paddle] += 1
    mean = 8000 / starts.size
    assert np.abs(starts - mean).max() < 5 * np.sqrt(mean)


@settings(deadline=None, max_examples=50)
@given(
    columns=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**32),
    actions=st.lists(st.integers(0, 2), min_size=1, max_size=50),
    cut=st.integers(0, 50),
)
def test_a_saved_game_continues_byte_for_byte(
    columns: int, seed: int, actions: list[int], cut: int
) -> None:
    def play(environment: Catch, actions: list[int]) -> list[Any]:
        trace: list[Any] = []
        for action in actions:
            frame, *rest = environment.step(action)
            trace.append((frame.tobytes(), *rest))
            if rest[1]:
                trace.append(environment.reset()[0].tobytes())
        return trace

    environment, other = Catch(columns), Catch(columns)
    environment.reset(seed=seed)
    play(environment, actions[:cut])
    state = json.loads(json.dumps(environment.save_state()))  # plain values only
    expected = play(environment, actions[cut:])
    other.load_state(state)
    assert other.save_state() == state
    assert play(other, actions[cut:]) == expected
    assert other.save_state() == environment.save_state()


def test_a_saved_game_continues_in_another_process() -> None:
    program = """
import json, sys
from drama.agent.env.catch import Catch
environment = Catch(16)
environment.load_state(json.loads(sys.argv[1]))
total = ""
for _ in range(40):
    environment.reset()
    for action in [0, 2, 2] * 5:
        frame, reward, *_ = environment.step(action)
        total += f"{int(frame.sum())} {reward} "
print(total, end="")
"""
    environment = Catch(16)
    environment.reset(seed=9)
    state = json.dumps(environment.save_state())
    done = subprocess.run(
        [sys.executable, "-c", program, state], capture_output=True, text=True, check=True
    )
    expected = ""
    for _ in range(40):
        environment.reset()
        for action in [0, 2, 2] * 5:
            frame, reward, *_ = environment.step(action)
            expected += f"{int(frame.sum())} {reward} "
    assert done.stdout == expected


def test_a_finished_game_saved_still_needs_its_reset() -> None:
    environment, other = Catch(8), Catch(8)
    environment.reset(seed=0)
    for _ in range(15):
        environment.step(STAY)
    other.load_state(environment.save_state())
    with pytest.raises(gymnasium.error.ResetNeeded):
        other.step(STAY)
    assert (other.reset()[0] == environment.reset()[0]).all()


def test_seeded_once_and_later_resets_continue() -> None:
    def starts(seed: int) -> list[bytes]:
        environment = Catch(16)
        first, _ = environment.reset(seed=seed)
        return [first.tobytes(), *(environment.reset()[0].tobytes() for _ in range(20))]

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)
    assert len(set(starts(1))) > 10


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="not 12"):
        Catch(12)
    environment = Catch(8)
    with pytest.raises(gymnasium.error.ResetNeeded):
        environment.step(STAY)
    environment.reset(seed=0)
    for action in (-1, 3):
        with pytest.raises(ValueError, match=f"action {action} "):
            environment.step(action)
    state = environment.save_state()
    with pytest.raises(ValueError, match=r"'Catch8'.*'Catch16'"):
        Catch(16).load_state(state)
    del state["steps"]
    with pytest.raises(ValueError, match="steps"):
        environment.load_state(state)


@pytest.mark.filterwarnings("ignore:.*render")
@pytest.mark.parametrize("columns", [8, 16])
def test_registered_with_gymnasium(columns: int) -> None:
    environment = gymnasium.make(f"drama/Catch{columns}-v0")
    assert isinstance(environment.unwrapped, Catch)
    assert box(environment.reset(seed=0)[0], OBJECT_COLOUR)[2] == 64 // columns
    check_env(environment.unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("game", "size"), [("Catch8", 8), ("Catch16", 4)])
def test_made_by_name(game: str, size: int) -> None:
    environment = make(game, environment_settings())
    assert environment.action_space == gymnasium.spaces.Discrete(3)
    assert environment.observation_space == gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert box(environment.reset(seed=0)[0], OBJECT_COLOUR)[2:] == (size, size)
    with pytest.raises(ConfigurationError, match=f"{game}.*image_size is 84"):
        make(game, environment_settings(image_size=84))
