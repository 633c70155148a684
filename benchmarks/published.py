"""The authors' published code beside ours on this machine: seconds per update, taking turns.

    python benchmarks/published.py CHECKOUT [--threads N] [--rounds R] [--device cpu|cuda]

CHECKOUT is a checkout of the published repository, which stays outside this one and unmodified.
What is timed of it is what its trainer calls at each step, with its own configuration: one update
of the world model, imagination, and one update of the behaviour. Both codes start from the same
random frames (uint8) and actions; drawing from the replay buffer is left out of both.

On a CPU its Transformer is timed, in float32: its Mamba-2 and its mixed precision need CUDA (with
`Use_amp` left on, its imagined states are bfloat16, which its float32 behaviour refuses). On a GPU
its Mamba-2 is timed as configured (bfloat16 autocast, CUDA graphs in imagination) with its
trainer's settings for cuDNN and TF32, and ours under bfloat16 autocast; that path has never been
run, for want of a GPU. Its trainer also passes both models to `torch.compile`, which compiles what
`forward` computes; its updates go through methods of other names, so that is left out.

The published code needs `einops` and `pytorch-warmup`, on a GPU also `triton` and `causal-conv1d`
with the calls of version 1.2. Its other dependencies have stand-ins below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from measuring import seconds
from torch import Tensor, nn
from updates import ACTIONS, PARTS, Updates

REQUIRED = ("einops", "pytorch_warmup")
REQUIRED_ON_GPU = ("triton", "causal_conv1d_cuda")
UNUSED = (
    "kornia", "kornia.augmentation", "wandb", "yacs", "yacs.config", "tensorboardX",
    "torch.utils.tensorboard", "selective_scan_cuda", "transformers", "transformers.generation",
    "transformers.utils", "transformers.utils.hub",
)  # fmt: skip


class RMSNorm(nn.Module):
    """Stands for torchtune's: normalises the last axis in float32, then scales."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        wide = x.float()
        size = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * size).to(x.dtype) * self.scale


def unused(*_: Any, **__: Any) -> None:
    """Stand for what is imported and never called: raises RuntimeError when it is."""
    raise RuntimeError("the published code called a dependency that has a stand-in here")


class UnusedModule(ModuleType):
    """A module in which every name is found, and is unused."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return unused


class Batches:
    """Stands for the published replay buffer: hands out fixed batches, in that buffer's format."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def sample(self, batch_size: int, length: int, imagine: bool) -> tuple[Tensor, ...]:
        """Return frames [B, L, 3, S, S] in [0, 1], actions, rewards and terminations [B, L]."""
        frames, actions = self.updates.contexts if imagine else self.updates.windows
        assert actions.shape == (batch_size, length), "the two codes' batch sizes differ"
        # Permuted without a copy, as theirs are: convolutions' speed hangs on the order in memory.
        pixels = (frames.float() / 255).permute(0, 1, 4, 2, 3)
        nothing = torch.zeros(actions.shape, device=actions.device)
        return pixels, actions.float(), nothing, nothing


def stand_ins(device: torch.device) -> dict[str, ModuleType]:
    """Return modules that the published code imports and that are not wanted for timing it."""
    names = (*UNUSED, "mamba_ssm") if device.type == "cpu" else UNUSED
    modules: dict[str, Any] = {name: UnusedModule(name) for name in names}
    for name in ("torchtune", "torchtune.modules", "line_profiler"):
        modules[name] = ModuleType(name)
    modules["torchtune.modules"].RMSNorm = RMSNorm
    modules["line_profiler"].profile = lambda function: function
    return modules


@contextlib.contextmanager
def import_path(checkout: Path, extra: dict[str, ModuleType]) -> Iterator[None]:
    """Let imports find the published code and its stand-ins, and afterwards nobody else's."""
    own = {path.stem for path in checkout.iterdir()}

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name in extra or name.split(".")[0] in own]
        return {name: sys.modules.pop(name) for name in names}

    namesakes = take_out()
    sys.modules.update(extra)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        take_out()
        sys.modules.update(namesakes)


def load_trainer(checkout: Path, device: torch.device) -> Any:
    """Import the published `train.py`; exits when it, or a package it computes with, is missing."""
    needed = REQUIRED + (REQUIRED_ON_GPU if device.type == "cuda" else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the published code needs packages that are missing: {missing}")
    if not (checkout / "train.py").is_file():
        raise SystemExit(f"{checkout}: no checkout of the published code, it has no train.py")
    with import_path(checkout, stand_ins(device)):
        return importlib.import_module("train")


@contextlib.contextmanager
def published_settings() -> Iterator[None]:
    """PyTorch's global settings as the published trainer leaves them; what it prints, to stderr."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.flags(True, benchmark=False, deterministic=True, allow_tf32=True)
    with cudnn, contextlib.redirect_stdout(sys.stderr):
        matmul.allow_tf32 = True
        yield
        matmul.allow_tf32 = before


class Published:
    """The published world model and agent, with what their trainer calls at each step."""

    def __init__(self, checkout: Path, updates: Updates, device: torch.device) -> None:
        self.trainer = load_trainer(checkout, device)
        settings = yaml.safe_load((checkout / "config_files/train.yaml").read_text())
        settings["BasicSettings"]["Device"] = str(device)
        if device.type == "cpu":
            settings["BasicSettings"] |= {"Use_amp": False, "Use_cg": False}
            settings["Models"]["WorldModel"]["Backbone"] = "Transformer"
        self.sizes = settings["JointTrainAgent"]
        config = self.trainer.DotDict(settings)
        models = self.trainer.WorldModel, self.trainer.agents.ActorCriticAgent
        built = (model(conf=config, action_dim=ACTIONS, device=device) for model in models)
        self.world_model, self.agent = (model.to(device) for model in built)
        self.replay = Batches(updates)
        # Its logger makes it fetch losses; at step 0 and every 2000th it would draw pictures too.
        self.step = {"logger": SimpleNamespace(log=lambda *_, **__: None), "global_step": 1}

    def learn_world_model(self) -> None:
        """One update of the world model."""
        self.trainer.train_world_model_step(
            self.replay, self.world_model, self.sizes["BatchSize"], self.sizes["BatchLength"],
            epoch=1, **self.step,
        )  # fmt: skip

    def imagine(self) -> None:
        """Trajectories for one update of the behaviour."""
        self.imagined = self.trainer.world_model_imagine_data(
            self.replay, self.world_model, self.agent, self.sizes["ImagineBatchSize"],
            self.sizes["ImagineContextLength"], self.sizes["ImagineBatchLength"],
            log_video=False, **self.step,
        )  # fmt: skip

    def learn_behaviour(self) -> None:
        """One update of actor and critic."""
        self.agent.update(*self.imagined, **self.step)


def measure(checkout: Path, rounds: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Time both codes in turn.

    Args:
        checkout: of the published repository.
        rounds: how often; the best time of each part and code counts.
        device: "cpu" or "cuda".

    Returns:
        The seconds of each part, and of all together, by code; `published` comes first. On a CPU
        ours comes in float32, as the published code, and in bfloat16, which that cannot do there.
    """
    place = torch.device(device)
    ours = Updates("xs", place)
    theirs = Published(checkout.resolve(), ours, place)
    codes = {"published": theirs, "ours": ours}
    if place.type == "cpu":
        codes["ours, bfloat16"] = ours
    best = {part: dict.fromkeys(codes, float("inf")) for part in PARTS}
    for _ in range(rounds):
        for part, times in best.items():
            for name, code in codes.items():
                ours.bfloat16 = place.type == "cuda" or name == "ours, bfloat16"
                with published_settings() if code is theirs else contextlib.nullcontext():
                    times[name] = min(times[name], seconds(getattr(code, part), place))
    named = {PARTS[part]: times for part, times in best.items()}
    return named | {"together": {name: sum(t[name] for t in best.values()) for name in codes}}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time the published code and ours in turn.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", FutureWarning)  # the published code is older than this PyTorch

    rows = measure(given.checkout, given.rounds, given.device)
    backbone = "Transformer" if given.device == "cpu" else "Mamba-2"
    codes = [name for name in rows["together"] if name != "published"]
    print(f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    heads = [f"published ({backbone}), s", *(f"{name}, s | times as fast" for name in codes)]
    print(f"| part | {' | '.join(heads)} |\n|---|---:|{'---:|---:|' * len(codes)}")
    for part, times in rows.items():
        cells = [f"{times[n]:.3g} | {times['published'] / times[n]:.2f}" for n in codes]
        print(f"| {part} | {times['published']:.3g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
