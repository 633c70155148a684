"""The Atari100k protocol on the real emulator: all games, gymnasium's wrapper, saved games."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ale_py
import gymnasium
import numpy as np
import pytest

from drama.agent.env import game_names, make
from drama.agent.env.atari import Atari, open_console
from drama.agent.settings import ATARI_100K, CATCH, GAMES, EnvironmentSettings
from drama.errors import ConfigurationError

# Minimal action sets of the 26 games, as the ALE documentation lists them.
ACTIONS = {
    "Alien": 18, "Amidar": 10, "Assault": 7, "Asterix": 9, "BankHeist": 18, "BattleZone": 18,
    "Boxing": 18, "Breakout": 4, "ChopperCommand": 18, "CrazyClimber": 9, "DemonAttack": 6,
    "Freeway": 3, "Frostbite": 18, "Gopher": 8, "Hero": 18, "Jamesbond": 18, "Kangaroo": 18,
    "Krull": 18, "KungFuMaster": 14, "MsPacman": 9, "Pong": 6, "PrivateEye": 18, "Qbert": 6,
    "RoadRunner": 18, "Seaquest": 18, "UpNDown": 6,
}  # fmt: skip


STICKY = {"repeat_action_probability": 0.25}


def settings(**changes: Any) -> EnvironmentSettings:
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


@pytest.fixture
def opened() -> Iterator[Any]:
    environments = []

    def open_game(game: str, **changes: Any) -> Atari:
        environment = make(game, settings(**changes))
        assert isinstance(environment, Atari)
        environments.append(environment)
        return environment

    yield open_game
    for environment in environments:
        environment.close()


@pytest.mark.parametrize("game", ATARI_100K)
def test_each_of_the_26_games(game: str, opened: Any) -> None:
    environment = opened(game)
    assert environment.action_space == gymnasium.spaces.Discrete(ACTIONS[game])
    assert opened(game, actions="full").action_space == gymnasium.spaces.Discrete(18)
    assert environment.observation_space == gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    frame, info = environment.reset(seed=0)
    frames = [frame]
    # CrazyClimber's first picture stands still the longest: 85 steps.
    for step in range(1, 91):
        frame, reward, terminated, truncated, info = environment.step(step % ACTIONS[game])
        frames.append(frame)
        assert isinstance(reward, float)
        assert (terminated, truncated) == (False, False)
        assert 0 < info["frames"] <= 4 * step
        assert isinstance(info["life_lost"], bool)
    assert all(frame in environment.observation_space for frame in frames)
    assert max(frame.max() for frame in frames) > 100  # not a black screen, nor scaled to [0, 1]
    assert len({frame.tobytes() for frame in frames}) > 1


@pytest.mark.filterwarnings("ignore:.*render")
def test_gymnasiums_own_checker_is_content(opened: Any) -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(opened("Pong"), skip_render_check=True)


def test_console_is_opened_as_the_protocol_says() -> None:
    emulator: Any = open_console("Pong").ale
    assert emulator.getFloat("repeat_action_probability") == 0.0
    assert emulator.getInt("max_num_frames_per_episode") == 0
    emulator.reset_game()
    emulator.act(0)
    assert emulator.getEpisodeFrameNumber() == 1


def test_sticky_actions_are_the_emulators_own(opened: Any) -> None:
    emulator: Any = open_console("Pong", 0.25).ale
    assert emulator.getFloat("repeat_action_probability") == 0.25
    assert opened("Pong", **STICKY)._console.ale.getFloat("repeat_action_probability") == 0.25
    assert opened("Pong")._console.ale.getFloat("repeat_action_probability") == 0.0


def test_with_sticky_actions_the_seed_matters_and_without_it_does_not(opened: Any) -> None:
    actions = np.random.default_rng(0).integers(4, size=80).tolist()

    def traces(**changes: Any) -> list[Any]:
        environment, found = opened("Breakout", **changes), []
        for seed in (1, 1, 2):
            environment.reset(seed=seed)
            found.append(play(environment, actions))
        return found

    first, again, other = traces(**STICKY)
    assert first == again != other
    first, again, other = traces()
    assert first == again == other


def test_sticky_actions_repeat_what_was_played_before(opened: Any) -> None:
    """Almost always, here: after FIRE the ball is served, whatever is asked for."""
    moved = {}
    for probability in (0.0, 0.999):
        environment = opened("Breakout", repeat_action_probability=probability)
        environment.reset(seed=0)
        screens = {environment.step(1)[0].tobytes() for _ in range(20)}
        moved[probability] = len(screens)
    assert moved[0.999] < 5 < moved[0.0], moved


def test_no_op_starts_are_what_no_ops_by_hand_are(opened: Any) -> None:
    environment, by_hand = opened("Freeway", no_op_starts=30), opened("Freeway", action_repeat=1)
    for seed in (1, 2, 3):
        frame, info = environment.reset(seed=seed)
        by_hand.reset(seed=seed)
        for _ in range(info["frames"]):
            by_hand.step(0)
        ours, theirs = environment.save_state(), by_hand.save_state()
        for key in ("before_reset", "played", "emulator"):
            assert np.array_equal(ours[key], theirs[key]), key
        assert frame.max() > 100


OTHERS = [name for name in game_names() if name not in GAMES]


def test_all_of_ale_pys_games_are_known() -> None:
    assert game_names()[:26] == list(ATARI_100K) and game_names()[-2:] == list(CATCH)
    assert {"SpaceInvaders", "MontezumaRevenge", "Enduro"} < set(OTHERS)
    assert len(set(game_names())) == len(game_names()) > 100


def test_each_of_the_other_games(opened: Any) -> None:
    """All those that ale-py has are opened and played, every tenth is saved."""
    for number, game in enumerate(OTHERS):
        environment = opened(game, action_repeat=1)
        environment.reset()
        actions = [step % int(environment.action_space.n) for step in range(8)]
        play(environment, actions)
        if number % 10 == 0:
            state = environment.save_state()
            expected = play(environment, actions)
            environment.load_state(state)
            assert play(environment, actions) == expected, game
        environment.close()


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_agrees_with_gymnasiums_preprocessing(game: str, opened: Any) -> None:
    """Where the two overlap: gymnasium's wrapper shows a stale frame when a repeat ends early.

    It stops a repeat at a lost life only when told to report that as a termination, which the
    unwrapped emulator ignores, so the game goes on there as here.
    """
    ours = opened(game)
    theirs = gymnasium.wrappers.AtariPreprocessing(
        ale_py.AtariEnv(game.lower(), frameskip=1, repeat_action_probability=0.0),
        noop_max=0,
        frame_skip=4,
        screen_size=64,
        terminal_on_life_loss=True,
        grayscale_obs=False,
    )
    frame, _ = ours.reset(seed=3)
    assert (frame == theirs.reset(seed=3)[0]).all()
    rng = np.random.default_rng(0)
    over, compared, losses, frames = False, 0, 0, 0
    while not over:
        action = int(rng.integers(ours.action_space.n))
        frame, reward, over, truncated, info = ours.step(action)
        their_frame, their_reward, their_end, their_truncated, their_info = theirs.step(action)
        assert (reward, truncated) == (their_reward, their_truncated)
        assert (over or info["life_lost"]) == their_end
        assert over == theirs.ale.game_over()
        assert info["lives"] == their_info["lives"]
        assert info["frames"] == their_info["episode_frame_number"]
        losses += info["life_lost"]
        if info["frames"] - frames == 4 and not their_end:
            assert (frame == their_frame).all()
            compared += 1
        frames = info["frames"]
    assert compared > 100 and losses == {"Pong": 0, "Breakout": 5}[game]


def test_truncation_on_the_real_emulator(opened: Any) -> None:
    environment = opened("Pong", max_frames=30)
    first, _ = environment.reset(seed=0)
    ends = [environment.step(0)[2:] for _ in range(8)]
    assert [truncated for _, truncated, _ in ends] == [False] * 7 + [True]
    assert not any(terminated for terminated, *_ in ends) and ends[-1][2]["frames"] == 30
    assert (environment.reset()[0] == first).all()


def test_seeds_decide_the_emulators_generator_and_later_resets_continue_it(opened: Any) -> None:
    def generators(environment: Atari, seed: int) -> list[bytes]:
        """The emulator as each of three resets found it, its generator included."""
        found = []
        for number in range(3):
            environment.reset(seed=None if number else seed)
            found.append(np.asarray(environment.save_state()["before_reset"]).tobytes())
            environment.step(0)
        return found

    one, other = opened("Pong"), opened("Pong")
    first = generators(one, 1)
    assert generators(other, 1) == first
    assert generators(one, 1) == first  # seeding anew starts over
    assert generators(one, 2)[0] != first[0]
    assert len(set(first)) == 3


# Saving. A trace is a digest of everything a step returns; a reset's frame is part of it.


def play(environment: Atari, actions: list[int]) -> list[tuple[Any, ...]]:
    trace: list[tuple[Any, ...]] = []
    for action in actions:
        frame, reward, terminated, truncated, info = environment.step(action)
        trace.append(
            (hashlib.sha256(frame.tobytes()).hexdigest(), reward, terminated, truncated, info)
        )
        if terminated or truncated:
            frame, info = environment.reset()
            trace.append((hashlib.sha256(frame.tobytes()).hexdigest(), info))
    return trace


def continue_elsewhere(
    game: str, changes: dict[str, Any], state: dict[str, Any], actions: list[int]
) -> list[tuple[Any, ...]]:
    environment = make(game, settings(**changes))
    environment.load_state(state)
    if state["reset_due"]:
        environment.reset()
    assert isinstance(environment, Atari)
    return play(environment, actions)


@pytest.fixture(scope="module")
def another_process() -> Iterator[ProcessPoolExecutor]:
    """A new process for every call, of a server that has opened no game."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
        yield executor


# Qbert is the game that ale-py's own restoring does not bring back.
@pytest.mark.parametrize(
    ("game", "changes", "before"),
    [
        ("Amidar", {}, 131),
        ("Breakout", {}, 250),
        ("Pong", {"max_frames": 500}, 160),
        ("Qbert", {}, 77),
        ("Qbert", {"action_repeat": 1}, 801),
        ("Breakout", STICKY, 250),
        ("Qbert", STICKY, 77),
        ("Pong", {"max_frames": 500, "no_op_starts": 30}, 160),
        ("Breakout", STICKY | {"no_op_starts": 30}, 160),
    ],
)
def test_a_saved_game_continues_byte_for_byte_in_another_process(
    game: str,
    changes: dict[str, Any],
    before: int,
    opened: Any,
    another_process: ProcessPoolExecutor,
) -> None:
    environment = opened(game, **changes)
    rng = np.random.default_rng(0)
    actions = rng.integers(environment.action_space.n, size=before + 400).tolist()
    environment.reset(seed=11)
    play(environment, actions[:before])
    state = environment.save_state()
    expected = play(environment, actions[before:])
    continued = another_process.submit(
        continue_elsewhere, game, changes, state, actions[before:]
    ).result()
    assert continued == expected
    if game in ("Breakout", "Pong"):
        assert len(expected) > 400  # the game ended and was reset on the way


def test_a_game_saved_when_over_continues_with_its_reset(
    opened: Any, another_process: ProcessPoolExecutor
) -> None:
    environment = opened("Breakout")
    environment.reset(seed=4)
    while not environment.step(1)[2]:
        pass
    state = environment.save_state()
    environment.reset()
    actions = [1, 2, 3, 0] * 75
    expected = play(environment, actions)
    continued = another_process.submit(continue_elsewhere, "Breakout", {}, state, actions).result()
    assert continued == expected


def test_a_state_saved_before_the_first_reset_carries_the_generator(opened: Any) -> None:
    one, other = opened("Pong"), opened("Pong")
    other.load_state(one.save_state())
    with pytest.raises(gymnasium.error.ResetNeeded):
        other.step(0)
    one.reset()
    other.reset()
    assert_same_state(one.save_state(), other.save_state())


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    for key, value in one.items():
        assert np.array_equal(value, other[key]), key


# Restored by ale-py alone, Amidar's first frame after a reset shows what was played before.
@pytest.mark.parametrize(("game", "before"), [("Amidar", 0), ("Qbert", 50)])
def test_loading_forgets_what_was_played_before(game: str, before: int, opened: Any) -> None:
    actions = np.random.default_rng(2).integers(6, size=before + 150).tolist()
    environment, used = opened(game, action_repeat=1), opened(game, action_repeat=1)
    environment.reset(seed=1)
    play(environment, actions[:before])
    state = environment.save_state()
    used.reset(seed=2)
    used.reset()
    play(used, actions[:5])
    used.load_state(state)
    assert_same_state(used.save_state(), state)
    expected = play(environment, actions[before:])
    assert play(used, actions[before:]) == expected
    used.load_state(state)
    assert play(used, actions[before:]) == expected


@pytest.mark.parametrize("game", ["Pong", "Qbert"])
def test_saving_changes_nothing(game: str, opened: Any) -> None:
    saved, unsaved = opened(game), opened(game)
    saved.reset(seed=1)
    unsaved.reset(seed=1)
    for action in np.random.default_rng(3).integers(6, size=60).tolist():
        saved.save_state()
        assert play(saved, [action]) == play(unsaved, [action])


def test_saved_values_are_plain(opened: Any) -> None:
    environment = opened("Pong")
    environment.reset(seed=0)
    environment.step(0)
    for key, value in environment.save_state().items():
        assert type(value) in (bool, int, float, str, np.ndarray), key
        if isinstance(value, np.ndarray):
            assert value.dtype == np.uint8 and value.ndim == 1 and value.flags.owndata, key


def test_a_state_that_does_not_fit_is_refused(opened: Any) -> None:
    environment = opened("Pong")
    environment.reset(seed=0)
    play(environment, [2] * 40)
    state = environment.save_state()
    with pytest.raises(ValueError, match=r"'Pong'.*'Breakout'"):
        opened("Breakout").load_state(state)
    with pytest.raises(ValueError, match=r"missing keys \['played'\], unknown \['player'\]"):
        environment.load_state({("player" if k == "played" else k): v for k, v in state.items()})
    with pytest.raises(ValueError, match="replaying 159 frames"):
        environment.load_state(state | {"played": np.asarray(state["played"])[:-1]})
    with pytest.raises(gymnasium.error.ResetNeeded):
        environment.step(0)


def test_a_closed_game_says_so(opened: Any) -> None:
    environment = opened("Pong")
    environment.reset(seed=0)
    environment.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="Pong"):
        environment.step(0)
    with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="Pong"):
        environment.reset()


def test_opening_a_game_prints_nothing() -> None:
    program = (
        "from drama.agent.settings import EnvironmentSettings; from drama.agent.env import make;"
        "make('Pong', EnvironmentSettings(action_repeat=4, image_size=64, max_frames=9,"
        " actions='minimal', repeat_action_probability=0.0, no_op_starts=0,"
        " life_loss_terminates='learning')).reset(seed=0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_game_is_named_with_its_nearest_match() -> None:
    with pytest.raises(ConfigurationError, match=r"'Brakout'.*'Breakout'.*Alien, .*Catch16"):
        make("Brakout", settings())
    with pytest.raises(ConfigurationError, match="did you mean 'SpaceInvaders'"):
        make("SpaceInvader", settings())
