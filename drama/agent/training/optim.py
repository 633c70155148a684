"""LaProp with warm-up, clipping and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drama.agent.settings import OptimiserSettings

DYNAMICS = ("A_log", "D", "dt_bias")
"""What mamba_ssm marks `_no_weight_decay`: a Mamba's decay rates, skip weights and step sizes."""


class LaProp:
    """LaProp (Ziyin, Wang, Ueda 2020): momentum over gradients that are normalised first.

        n_t = beta2 n + (1 - beta2) g^2
        m_t = beta1 m + (1 - beta1) g / (sqrt(n_t / (1 - beta2^t)) + epsilon)
        theta_t = theta - rate_t m_t / (1 - beta1^t)

    Gradients are scaled down to `clip_norm` before; weight decay removes a fixed share of every
    parameter that `decay_spares` does not spare, not scaled by the rate; the rate rises linearly
    over `warmup_updates`.

    Args:
        parameters: by name, so that a saved state can be matched.
        settings: rates and decays.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimiserSettings) -> None:
        self.settings = settings
        self.names = list(parameters)
        self.parameters: list[Tensor] = list(parameters.values())
        spares = settings.decay_spares != "nothing"
        self.decayed: list[Tensor] = [
            p for n, p in parameters.items() if not (spares and is_spared(n, p))
        ]
        self.averages = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        # Counted on the device: a recorded update must count on, though Python does not run.
        self.updates = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)

    def rate(self) -> Tensor:
        """Return the step size of the next update, float64 []."""
        warmup = max(1, self.settings.warmup_updates)
        return self.settings.learning_rate * ((self.updates + 1) / warmup).clamp(max=1)

    def minimise(self, loss: Tensor) -> Tensor:
        """Take one step down the gradient of a scalar.

        Returns:
            The gradients' norm before clipping, [].
        """
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.step()
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients that lie on the parameters."""
        settings = self.settings
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        rate = self.rate()
        self.updates += 1
        average_correction = 1 - settings.beta1**self.updates  # []
        square_correction = 1 - settings.beta2**self.updates  # []
        # In the parameters' own type, which fused loops over many tensors ask for.
        dtype = self.parameters[0].dtype
        step_size = (rate / average_correction).to(dtype)

        torch._foreach_mul_(self.squares, settings.beta2)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - settings.beta2)
        scale = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(scale, square_correction.sqrt().to(dtype))
        torch._foreach_add_(scale, settings.epsilon)
        torch._foreach_mul_(self.averages, settings.beta1)
        torch._foreach_addcdiv_(self.averages, gradients, scale, 1 - settings.beta1)
        if settings.weight_decay:
            torch._foreach_mul_(self.decayed, 1 - settings.weight_decay)
        torch._foreach_sub_(self.parameters, torch._foreach_mul(self.averages, step_size))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter name, and the number of updates."""
        return {
            "updates": int(self.updates),
            "averages": dict(zip(self.names, self.averages, strict=True)),
            "squares": dict(zip(self.names, self.squares, strict=True)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            KeyError: when it is of other parameters.
        """
        for kind, target in (("averages", self.averages), ("squares", self.squares)):
            saved = state[kind]
            if set(saved) != set(self.names):
                raise KeyError(f"{kind} of other parameters: {set(saved) ^ set(self.names)}")
            for name, tensor in zip(self.names, target, strict=True):
                tensor.copy_(torch.as_tensor(saved[name]))
        self.updates.fill_(int(state["updates"]))


def is_spared(name: str, parameter: Tensor) -> bool:
    """Say whether `gains_and_dynamics` spares a parameter: a norm's gain, or Mamba's dynamics.

    Every other layer's weight is a matrix at least, so a vector of that name is a gain.
    """
    own = name.rpartition(".")[2]
    return own in DYNAMICS or (own == "weight" and parameter.ndim == 1)
