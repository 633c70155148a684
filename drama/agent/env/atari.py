"""Atari games under the Atari100k protocol.

One agent step repeats an action for `action_repeat` raw frames and shows the pixel-wise maximum of
the last two, resized by area interpolation. Rewards are summed and not clipped. The repeat ends
early when a life is lost or the game ends. An episode is truncated at `max_frames` raw frames.
Actions are sticky and games begin with no-ops only where the settings ask for it, which the
protocol does not. The game is reset only when over.

Saving. ale-py 0.12 leaves the video chip's frame buffers and its partial-frame flag out of a
serialised emulator: a restored Qbert plays on differently, a restored Amidar can show a wrong
frame. A reset, however, puts the whole console into a known state. So a saved game is the emulator
as it was before the last reset, its generator included, and the actions played since: loading
resets and replays them (at most max_frames raw frames, some 50 microseconds each), then holds the
outcome against the emulator as it was when saved. Which actions stick is up to the emulator's
generator, so a replay repeats that, too; how many no-ops a game begins with, to `np_random`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import ale_py
import cv2
import gymnasium
import numpy as np

from drama.agent.env.base import AgentEnvironment, Frame, State, Step, check_state
from drama.agent.settings import EnvironmentSettings

NO_OP = ale_py.Action.NOOP.value
_STATE_KEYS = frozenset({"game", "before_reset", "played", "emulator", "reset_due", "random_state"})


def atari_names() -> list[str]:
    """Return the names of ale-py's games, as in `ALE/<name>-v5`, in alphabetical order."""
    gymnasium.register_envs(ale_py)
    return sorted(spec.name for spec in gymnasium.registry.values() if spec.namespace == "ALE")


def open_console(game: str, repeat_action_probability: float = 0.0) -> ale_py.AtariEnv:
    """Open one Atari game: one raw frame per action, no frame limit of its own.

    Args:
        game: the game's name in Gymnasium's `ALE/<game>-v5`.
        repeat_action_probability: of sticky actions, for every raw frame.
    """
    # Before the first emulator exists: the banner is printed when it is made.
    ale_py.ALEInterface.setLoggerMode(cast(Any, ale_py.LoggerMode.Error))
    gymnasium.register_envs(ale_py)
    environment = gymnasium.make(
        f"ALE/{game}-v5",
        frameskip=1,
        repeat_action_probability=repeat_action_probability,
        max_num_frames_per_episode=0,
        disable_env_checker=True,
    )
    return cast(ale_py.AtariEnv, environment.unwrapped)


class Atari(AgentEnvironment):
    """One Atari game under the Atari100k protocol ("Drama", arXiv 2410.08893, section 3).

    `info` holds `life_lost` (bool), `lives` (int) and `frames` (int, raw frames of this episode).
    A repeat that ends after a single frame shows the maximum of that frame and the one before it,
    the last of the previous step; the first observation of an episode is its first frame alone.
    """

    def __init__(
        self, game: str, settings: EnvironmentSettings, console: ale_py.AtariEnv | None = None
    ) -> None:
        """Open the game.

        Args:
            game: the game's name in Gymnasium's `ALE/<game>-v5`.
            settings: action repeat, image size in pixels, episode cap in raw frames, action set,
                sticky actions, no-op starts.
            console: the machine to play on; by default ale-py's, as `open_console` sets it up.
        """
        self._game = game
        self._settings = settings
        if console is None:
            console = open_console(game, settings.repeat_action_probability)
        self._console: ale_py.AtariEnv | None = console
        emulator = self._console.ale
        minimal = settings.actions == "minimal"
        actions = emulator.getMinimalActionSet() if minimal else emulator.getLegalActionSet()
        self._action_codes = [action.value for action in actions]

        size = settings.image_size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self._action_codes))

        # Raw frames alternate between the two: the latest and the one before it.
        shape = (*emulator.getScreenDims(), 3)
        self._screens = (np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))
        self._maximum = np.zeros(shape, np.uint8)
        self._latest = 0

        self._before_reset = emulator.cloneState(include_rng=True)
        self._played = bytearray()  # one action code per raw frame since the reset
        self._lives = 0
        self._reset_due = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Start a new game.

        Args:
            seed: seeds emulator and no-op starts anew; without one their generators continue.
            options: not used.

        Returns:
            The first frame (the last no-op's, where there are any), uint8 [image_size,
            image_size, 3], and the info.
        """
        super().reset(seed=seed)
        emulator = self._emulator()
        if seed is not None:
            assert self._console is not None
            self._console.seed_game(seed)
            self._console.load_game()  # a seed takes effect when the game is loaded
        self._restart(emulator)
        most = self._settings.no_op_starts
        for _ in range(self.np_random.integers(1, most + 1) if most else 0):
            emulator.act(NO_OP)
            self._played.append(NO_OP)
            if emulator.game_over(with_truncation=False):
                self._restart(emulator)
        self._begin(emulator)
        return self._resized(self._screens[self._latest]), self._info(life_lost=False)

    def step(self, action: int) -> Step:
        """Repeat an action and return what came of it.

        Args:
            action: index into the action set, 0 <= action < action_space.n.

        Returns:
            Frame uint8 [image_size, image_size, 3], summed reward, terminated (the game is over),
            truncated (the episode has reached its cap of raw frames), info.

        Raises:
            ValueError: the action is out of range.
            gymnasium.error.ResetNeeded: the episode is over, or none was started.
        """
        emulator = self._emulator()
        if self._reset_due:
            raise gymnasium.error.ResetNeeded(f"{self._game}: no episode in progress, call reset()")
        if not 0 <= action < len(self._action_codes):
            allowed = f"0 to {len(self._action_codes) - 1}"
            raise ValueError(f"{self._game}: action {action} is out of range ({allowed})")
        code = self._action_codes[action]
        reward, life_lost, terminated, truncated = 0.0, False, False, False
        for _ in range(self._settings.action_repeat):
            reward += emulator.act(code)
            self._played.append(code)
            # Every frame, for any can turn out to be one of the last two.
            self._fetch_screen(emulator)
            lives = emulator.lives()
            life_lost, self._lives = lives < self._lives, lives
            terminated = emulator.game_over(with_truncation=False)
            truncated = not terminated and len(self._played) >= self._settings.max_frames
            if life_lost or terminated or truncated:
                break
        self._reset_due = terminated or truncated
        np.maximum(*self._screens, out=self._maximum)
        return self._resized(self._maximum), reward, terminated, truncated, self._info(life_lost)

    def save_state(self) -> State:
        """Return everything the continuation depends on; the environment itself is unchanged.

        Returns:
            game (str), before_reset and emulator (uint8 [bytes]: ale-py's serialised states,
            generator included), played (uint8 [raw frames]: action codes), reset_due (bool),
            random_state (str: that of `np_random` as JSON).
        """
        return {
            "game": self._game,
            "before_reset": np.frombuffer(self._before_reset.serialize(), np.uint8).copy(),
            "played": np.frombuffer(bytes(self._played), np.uint8).copy(),
            "emulator": np.frombuffer(self._serialised(), np.uint8).copy(),
            "reset_due": self._reset_due,
            "random_state": json.dumps(self.np_random.bit_generator.state),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, byte for byte; see `AgentEnvironment.load_state`.

        Raises:
            ValueError: the state is of another game, has other keys, or the emulator does not
                reproduce it (it was saved with another ale-py).
        """
        check_state(state, self._game, _STATE_KEYS)
        emulator = self._emulator()
        self.np_random.bit_generator.state = json.loads(state["random_state"])
        self._before_reset = ale_py.ALEState(_bytes(state["before_reset"]))
        self._played = bytearray(_bytes(state["played"]))
        self._reset_due = True
        if state["reset_due"]:
            # The generator is all that outlives the reset to come.
            emulator.restoreState(ale_py.ALEState(_bytes(state["emulator"])))
            return
        emulator.restoreState(self._before_reset)
        emulator.reset_game()
        for code in self._played:
            emulator.act(code)
        if self._serialised() != _bytes(state["emulator"]):
            raise ValueError(
                f"{self._game}: replaying {len(self._played)} frames did not lead to the saved "
                f"emulator; load it with the ale-py that saved it (this is {ale_py.__version__})"
            )
        self._begin(emulator)

    def close(self) -> None:
        """Let the emulator go; stepping on afterwards is an error, closing twice is not."""
        if self._console is not None:
            self._console.close()
            self._console = None

    def _restart(self, emulator: ale_py.ALEInterface) -> None:
        self._before_reset = emulator.cloneState(include_rng=True)
        self._played = bytearray()
        emulator.reset_game()

    def _begin(self, emulator: ale_py.ALEInterface) -> None:
        self._fetch_screen(emulator)
        self._lives = emulator.lives()
        self._reset_due = False

    def _emulator(self) -> ale_py.ALEInterface:
        if self._console is None:
            raise gymnasium.error.ClosedEnvironmentError(f"{self._game}: environment is closed")
        return self._console.ale

    def _fetch_screen(self, emulator: ale_py.ALEInterface) -> None:
        self._latest = 1 - self._latest
        emulator.getScreenRGB(self._screens[self._latest])

    def _serialised(self) -> bytes:
        return self._emulator().cloneState(include_rng=True).serialize()

    def _resized(self, screen: Frame) -> Frame:
        size = self._settings.image_size
        return cast(Frame, cv2.resize(screen, (size, size), interpolation=cv2.INTER_AREA))

    def _info(self, life_lost: bool) -> dict[str, Any]:
        return {"life_lost": life_lost, "lives": self._lives, "frames": len(self._played)}


def _bytes(array: np.ndarray) -> bytes:
    return np.asarray(array, np.uint8).tobytes()
