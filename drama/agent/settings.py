"""The settings that define a run, and the recipe that holds them: names, types, bounds.

Values are in config/presets/; `drama.pipeline.config` reads layers of them and checks them.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from drama.reading import Fingerprint

ATARI_100K = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout",
    "ChopperCommand", "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero",
    "Jamesbond", "Kangaroo", "Krull", "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert",
    "RoadRunner", "Seaquest", "UpNDown",
)  # fmt: skip
"""The 26 games of the Atari100k benchmark (Kaiser et al. 2020), by their ALE names."""

CATCH = ("Catch8", "Catch16")
"""The project's own small games, for checking that the agent learns (drama/agent/env/catch.py)."""

GAMES = ATARI_100K + CATCH
"""The games that are known without ale-py's list of all its own (`drama.agent.env.game_names`)."""


class Frozen(BaseModel):
    """Base of all settings: immutable, strictly typed, no unknown keys, no hidden defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=10_000)]
Every = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Widths = Annotated[tuple[Size, ...], Field(min_length=1)]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError("the first of the two must be the smaller one")
    return value


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that a pixel lies in its middle")
    return value


class EnvironmentSettings(Frozen):
    """How a game is played (Atari100k protocol)."""

    action_repeat: Annotated[int, Field(ge=1, le=64)]
    image_size: Annotated[int, Field(ge=8, le=256)]
    max_frames: Count
    actions: Literal["minimal", "full"]
    repeat_action_probability: Rate
    no_op_starts: Annotated[int, Field(ge=0, le=10_000)]
    life_loss_terminates: Literal["learning", "nothing", "episode"]


class ReplaySettings(Frozen):
    """Replay memory and the distribution its windows are drawn from (DFS, section 2.3)."""

    sampling: Literal["dfs", "uniform"]
    capacity: Annotated[int, Field(ge=1, le=10_000_000)]
    world_model_temperature: Positive
    imagination_temperature: Positive
    alpha: NonNegative
    beta: NonNegative
    shuffle_rewards: bool


class OptimiserSettings(Frozen):
    """LaProp (Ziyin et al. 2020) with linear warm-up and gradient clipping."""

    learning_rate: Positive
    warmup_updates: Annotated[int, Field(ge=0, le=10_000_000)]
    clip_norm: Positive
    weight_decay: Rate
    decay_spares: Literal["nothing", "gains_and_dynamics"]
    beta1: Rate
    beta2: Rate
    epsilon: Positive


Backend = Literal["auto", "torch", "mamba_ssm"]
"""What computes Mamba-2; part of no setting, since it changes nothing beyond rounding."""


class SequenceModelSettings(Frozen):
    """The sequence model f, which turns latents and actions into deterministic states d."""

    kind: Literal["mamba2", "mamba", "transformer", "gru", "rwkv"]
    width: Size
    blocks: Annotated[int, Field(ge=1, le=64)]
    dropout: Rate
    state_size: Size
    convolution_width: Annotated[int, Field(ge=2, le=4)]
    expand: Annotated[int, Field(ge=1, le=8)]
    head_width: Size
    chunk_length: Size


class WorldModelSettings(Frozen):
    """Encoder, decoder, latent and heads of the world model, and how it is trained."""

    channels: Widths
    kernel: Annotated[int, Field(ge=1, le=15), AfterValidator(_odd)]
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=1)]
    categoricals: Size
    classes: Annotated[int, Field(ge=2, le=65_536)]
    uniform_mix: Rate
    head_hidden: Size
    bins: Annotated[int, Field(ge=3, le=65_535)]
    bin_limit: Positive
    reconstruction: Literal["squared_error", "gaussian"]
    free_nats: NonNegative
    dynamics_weight: NonNegative
    representation_weight: NonNegative
    batch_size: Size
    sequence_length: Annotated[int, Field(ge=2, le=10_000)]
    optimiser: OptimiserSettings


class BehaviourSettings(Frozen):
    """Actor, critic and the imagination they learn from."""

    actor_hidden: Size
    critic_hidden: Size
    layers: Annotated[int, Field(ge=1, le=16)]
    contexts: Size
    context_length: Length
    horizon: Length
    discount: Fraction
    lambda_: Annotated[float, Field(ge=0, le=1, alias="lambda")]
    entropy_weight: NonNegative
    return_percentiles: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
    return_ema: Rate
    slow_critic_ema: Rate
    act_on: Literal["prior", "posterior"]
    acting_window: Length
    temperature: Annotated[float, Field(ge=0.01, le=100)]
    epsilon: Fraction
    as_published: bool
    optimiser: OptimiserSettings


class TrainingSettings(Frozen):
    """The schedule: how long, how much random play first, how often each part is updated."""

    total_steps: Count
    random_steps: Count
    world_model_every: Every
    behaviour_every: Every
    log_every: Every
    precision: Literal["auto", "float32", "bfloat16"]


class Settings(Frozen):
    """Everything, besides game and seed, that defines a run's result."""

    environment: EnvironmentSettings
    replay: ReplaySettings
    world_model: WorldModelSettings
    sequence_model: SequenceModelSettings
    behaviour: BehaviourSettings
    training: TrainingSettings


Actions = Literal["greedy", "sampled"]
"""How an agent chooses: the most probable action, or one drawn from its policy."""

WAYS: tuple[Actions, ...] = get_args(Actions)


def _none_or_several(value: int) -> int:
    if value == 1:
        raise ValueError(
            "must be 0 (play all episodes) or at least 2: one alone is always the same"
        )
    return value


class EvaluationSettings(Frozen):
    """How a finished run is scored."""

    episodes: Annotated[int, Field(ge=1, le=100_000)]
    environments: Annotated[int, Field(ge=1, le=1_000)]
    actions: Actions
    both: bool
    enough_same: Annotated[int, Field(ge=0, le=100_000), AfterValidator(_none_or_several)]

    @property
    def ways(self) -> tuple[Actions, ...]:
        """How actions are chosen in what is played: the score's way first."""
        others = tuple(way for way in WAYS if way != self.actions)
        return (self.actions, *others) if self.both else (self.actions,)


class Recipe(Frozen):
    """Everything that defines one run's result; its file's SHA-256 is the run's fingerprint.

    Attributes:
        format: version of this file's layout.
        preset: name of the preset it came from.
        game: name of the game.
        seed: the run's seed.
        settings: every hyperparameter.
        code: hash of the run-defining code.
        runtime: hash of the lock file that pins what the code runs on.
        ancestor: fingerprint of the finished run that this one goes on from; None, and not in the
            file, for a run that begins at step 0.
    """

    format: Literal[1]
    preset: str
    game: str
    seed: Annotated[int, Field(ge=0)]
    settings: Settings
    code: str
    runtime: str
    ancestor: Annotated[Fingerprint | None, Field(exclude_if=lambda value: value is None)] = None
