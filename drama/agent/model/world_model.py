"""The world model: posterior, dynamics, prior, reward, termination, reconstruction, and its loss.

Section 2 of the paper. The posterior z_t ~ q(z_t | o_t) sees one frame only, so the sequence model
runs over a whole sequence in parallel: d_t = f(z_<=t, a_<=t). From d_t come the prior of the next
latent p(z_{t+1} | d_t), the reward r_t and the termination e_t that followed the action a_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.model.distributions import (
    TwoHot,
    categorical_kl,
    mixed_probabilities,
    sample_one_hot,
    straight_through,
)
from drama.agent.model.nets import RGB, ConvolutionStack, Decoder, Encoder, Enlarge, Head, to_pixels
from drama.agent.model.sequence import SequenceModel, State, build
from drama.agent.settings import Settings
from drama.agent.shapes import check_shapes

VARIANCE_FLOOR = 1e-8
"""Far below the rounding of an 8-bit pixel, 1e-6: keeps the logarithm finite."""


@dataclass(frozen=True)
class WorldModelLosses:
    """Scalars of one world-model update; `total` is what is minimised."""

    total: Tensor
    reconstruction: Tensor
    reward: Tensor
    termination: Tensor
    dynamics: Tensor
    representation: Tensor


class WorldModel(nn.Module):
    """The world model.

    Args:
        settings: sections `environment`, `world_model` and `sequence_model` are used.
        actions: A, the number of actions.

    Attributes:
        sizes: what settings and game fix of the letters in shapes, for `check_shapes`.
    """

    def __init__(self, settings: Settings, actions: int) -> None:
        super().__init__()
        self.settings = settings.world_model
        model = settings.world_model
        size = settings.environment.image_size
        width = settings.sequence_model.width
        self.actions = actions
        self.pixels = RGB * size * size
        self.latent_shape = (model.categoricals, model.classes)
        self.latent_size = model.categoricals * model.classes  # Z
        self.state_size = self.latent_size + width  # Z + D
        self.sizes = {"A": actions, "C": model.classes, "K": model.categoricals, "S": size}
        self.encoder = Encoder(size, model)
        self.decoder = Decoder(size, model)
        self.sequence: SequenceModel = build(self.latent_size + actions, settings.sequence_model)
        self.prior_head = nn.Linear(width, self.latent_size)
        self.reward_head = Head(width, model.head_hidden, model.bins, zero_last=True)
        self.termination_head = Head(width, model.head_hidden, 1)
        self.two_hot = TwoHot(model.bins, model.bin_limit)
        self.choose_path(plain=False)

    def choose_path(self, *, plain: bool) -> None:
        """Choose the fast path, which a new model takes, or the plain one.

        They differ in the order of work and the layout of memory, so in rounding at most.
        """
        self.plain = plain
        layout = torch.contiguous_format if plain else torch.channels_last
        for layer in self.modules():
            if isinstance(layer, ConvolutionStack):
                layer.in_parts = not plain
            if isinstance(layer, Enlarge):
                layer.as_product = not plain
            # A convolution computes in the layout of its weights.
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=layout)

    def posterior(self, frames: Tensor) -> Tensor:
        """Return the probabilities of q(z | o).

        Args:
            frames: uint8 [..., S, S, 3].

        Returns:
            [..., K, C].
        """
        flat = frames.flatten(0, -4)  # [F, S, S, 3]
        whole = self.plain or self.training or flat.is_cuda
        at_once = self.encoder.backbone.frames_at_once
        if whole or len(flat) <= at_once:
            logits = self.encoder(to_pixels(flat))
        else:
            encode = self.encoder.folded()
            parts = flat.split(at_once)
            logits = torch.cat([encode(to_pixels(part)) for part in parts])
        return self._mixed(logits).reshape(*frames.shape[:-3], *self.latent_shape)

    def prior(self, d: Tensor) -> Tensor:
        """Return the probabilities of p(z_{t+1} | d_t): d [..., D] to [..., K, C]."""
        return self._mixed(self.prior_head(d).unflatten(-1, self.latent_shape))

    def _mixed(self, logits: Tensor) -> Tensor:
        return mixed_probabilities(logits, self.settings.uniform_mix)

    def reward(self, d: Tensor) -> Tensor:
        """Return the expected reward after the action that d [..., D] has seen, [...]."""
        return self.two_hot.decode(self.reward_head(d))

    def terminates(self, d: Tensor) -> Tensor:
        """Return whether the action that d [..., D] has seen ended the episode, bool [...]."""
        return self.termination_head(d).squeeze(-1) > 0

    def inputs(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Join latents [..., K, C] and action indices [...] into inputs of f, [..., Z + A]."""
        assert latents.shape[:-2] == actions.shape, (
            f"latents {tuple(latents.shape)} and actions {tuple(actions.shape)} must agree"
        )
        one_hot = F.one_hot(actions, self.actions).to(latents.dtype)
        return torch.cat([latents.flatten(-2), one_hot], -1)

    def loss(
        self, frames: Tensor, actions: Tensor, rewards: Tensor, terminations: Tensor
    ) -> WorldModelLosses:
        """Compute the world model's loss on a batch of windows (equation 7 of the paper).

        Args:
            frames: o_1 ... o_L, uint8 [B, L, S, S, 3].
            actions: a_1 ... a_L, int64 [B, L].
            rewards: r_t follows a_t, float [B, L].
            terminations: e_t follows a_t, bool [B, L].

        Returns:
            Scalars, averaged over batch and time.

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(
            self.sizes,
            frames=(frames, "B L S S 3"),
            actions=(actions, "B L"),
            rewards=(rewards, "B L"),
            terminations=(terminations, "B L"),
        )
        batch, length = actions.shape
        pixels = to_pixels(frames)  # [F, 3, S, S], where F = B L
        posterior = self._mixed(self.encoder(pixels))  # [F, K, C]
        latents = straight_through(posterior)
        reconstruction = self.decoder(latents.flatten(1))
        d, _ = self.sequence(self.inputs(latents.unflatten(0, (batch, length)), actions))
        following = posterior.unflatten(0, (batch, length))[:, 1:]  # q_{t+1} [B, L - 1, K, C]
        prior = self.prior(d[:, :-1])  # p_{t+1} [B, L - 1, K, C]
        error = reconstruction_loss(reconstruction, pixels)
        reward = self.two_hot.loss(self.reward_head(d), rewards).mean()
        termination = F.binary_cross_entropy_with_logits(
            self.termination_head(d).squeeze(-1).float(), terminations.float()
        )
        dynamics = categorical_kl(following.detach(), prior).mean()
        representation = categorical_kl(following, prior.detach()).mean()
        # Free bits apply to each KL after averaging over batch and time.
        settings = self.settings
        gaussian = settings.reconstruction == "gaussian"
        total = (
            (gaussian_reconstruction_loss(error, self.pixels) if gaussian else error)
            + reward
            + termination
            + settings.dynamics_weight * dynamics.clamp(min=settings.free_nats)
            + settings.representation_weight * representation.clamp(min=settings.free_nats)
        )
        return WorldModelLosses(total, error, reward, termination, dynamics, representation)

    @torch.no_grad()
    def observe(
        self, frames: Tensor, actions: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Encode real steps and run the dynamics over them, to start imagination from.

        Args:
            frames: uint8 [B, L, S, S, 3]; with `places`, each distinct one once, [F, S, S, 3].
            actions: int64 [B, L].
            places: which of the F frames each step shows, int64 [B, L].

        Returns:
            A sample of the next latent [B, K, C], d_L [B, D] and the sequence model's states.

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(
            self.sizes,
            frames=(frames, "B L S S 3" if places is None else "F S S 3"),
            actions=(actions, "B L"),
            places=(places, "B L"),
        )
        posterior = self.posterior(frames)
        if places is not None:
            posterior = posterior[places]
        latents = sample_one_hot(posterior)  # [B, L, K, C]
        d, states = self.sequence(self.inputs(latents, actions))
        return sample_one_hot(self.prior(d[:, -1])), d[:, -1], states

    @torch.no_grad()
    def imagine_step(
        self, latents: Tensor, actions: Tensor, states: list[State]
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Imagine one step.

        Args:
            latents: one-hot [B, K, C].
            actions: int64 [B].
            states: the sequence model's.

        Returns:
            A sample of the next latent [B, K, C], d [B, D], and the next states.

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(self.sizes, latents=(latents, "B K C"), actions=(actions, "B"))
        d, states = self.sequence.step(self.inputs(latents, actions), states)
        return sample_one_hot(self.prior(d)), d, states


def reconstruction_loss(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Squared error summed over pixels and channels, averaged over images: [F, 3, S, S] to []."""
    assert reconstruction.shape == pixels.shape, (
        f"reconstruction {tuple(reconstruction.shape)} against pixels {tuple(pixels.shape)}"
    )
    # Flat, in the order of memory: summed over four dimensions, a CPU takes ten times as long.
    difference = (reconstruction.float() - pixels).permute(0, 2, 3, 1).flatten()
    return torch.linalg.vector_norm(difference).square() / len(pixels)


def gaussian_reconstruction_loss(squared_error: Tensor, pixels: int) -> Tensor:
    """Turn a squared error into a likelihood whose variance is the one that fits best.

    n / 2 ln(error / n): the negative log-likelihood of n independent Gaussians with one shared
    variance, at the variance that maximises it (Rybkin et al. 2021, "Simple and effective VAE
    training with calibrated decoders"), constants aside. The weight of what is still wrong grows
    as the rest of the picture is learned, so a small object is not left to the KL's mercy.

    Args:
        squared_error: summed over a frame's pixel values, averaged over frames, [].
        pixels: n, a frame's pixel values.
    """
    return pixels / 2 * torch.log(squared_error / pixels + VARIANCE_FLOOR)
