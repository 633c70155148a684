"""An agent's weights as one file to download, check and play with: safetensors, without pickle.

The file holds the parameters and buffers of world model and behaviour, the decoder's in half
precision, and in its metadata the recipe that says how to build the agent. Whatever is read from
such a file is held to that recipe, and the file to its checksum, before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import build_agent, new_agent
from drama.agent.settings import Fingerprint, Frozen, Recipe
from drama.errors import DramaError, cut, reason
from drama.files import canonical_json, replacing, sha256_text
from drama.pipeline.artifacts.records import OtherCode, RecordedRun, known_recipe
from drama.pipeline.layers import few
from drama.pipeline.names import Commit
from drama.reading import open_regular, parse_json
from drama.runs.folder import SHORT, short_commit

HEADER_LIMIT = 1 << 20
"""Bytes a file's header may have; an agent's has some 20 000."""
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""What safetensors calls a dtype."""
SLOW_CRITIC, CRITIC = "behaviour.slow_critic.", "behaviour.critic."
"""The slow critic plays no part in playing: it is left out, and starts again as the critic."""

DECODER = "world_model.decoder."
"""Its matrices are stored in half precision: they draw pictures, and play no part in playing."""

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor."""


class WeightsError(DramaError):
    """A file of weights that cannot be used; the text names it and what to do."""


class Metadata(Frozen):
    """A weights file's metadata, where every value is a text.

    Attributes:
        format: version of this layout.
        recipe: the run's recipe, as it was recorded.
        fingerprint: the recipe's SHA-256, the run's fingerprint.
        checkpoint_sha256: of the checkpoint that the weights are from, as the run's record has it.
        git_commit: that the run was made at; empty when it is not known.
        versions: of Python and the libraries that the run was made with, as JSON.
        sha256: of everything else in the file, metadata and tensors.
    """

    format: Literal["1"]
    recipe: Annotated[str, Field(max_length=1 << 16)]
    fingerprint: Fingerprint
    checkpoint_sha256: Fingerprint
    git_commit: Commit | Literal[""]
    versions: Annotated[str, Field(max_length=1 << 14)]
    sha256: Fingerprint


@dataclass(frozen=True)
class Weights:
    """What a weights file holds; everything in it has been checked.

    Attributes:
        path: the file.
        metadata: the file's.
        recipe: the run's, as today's code understands it.
        tensors: by name, as the file holds them.
    """

    path: Path
    metadata: Metadata
    recipe: Recipe
    tensors: dict[str, np.ndarray]

    def agent(self, device: torch.device) -> Agent:
        """Build the agent, in evaluation mode."""
        slow = {
            SLOW_CRITIC + name.removeprefix(CRITIC): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(CRITIC)
        }
        return build_agent(self.recipe, self.tensors | slow, device)


# --- writing -------------------------------------------------------------------------------------


def write_weights(run: RecordedRun, state: Mapping[str, np.ndarray]) -> None:
    """Write a run's weights; the same run gives the same bytes.

    Args:
        run: a whole run.
        state: parameters and buffers of its agent, from its checkpoint.

    Raises:
        OtherCode: when today's agent has other tensors.
        WeightsError: when what was written does not read back as it should.
    """
    check_tensors(run.folder, run.recipe, shapes_of(state), run.record.git_commit)
    tensors = _stored(state)
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise WeightsError(f"{run.folder}: nothing is exported: a weight is not finite as stored")
    metadata = {
        "format": "1",
        "recipe": canonical_json(run.record.recipe),
        "fingerprint": run.fingerprint,
        "checkpoint_sha256": run.checkpoint.sha256,
        "git_commit": run.record.git_commit or "",
        "versions": json.dumps(run.record.versions, sort_keys=True),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    with replacing(run.weights) as temporary:
        temporary.write_bytes(_in_order(save(tensors, metadata)))
        read_weights(temporary)


def _stored(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a file holds of an agent's tensors."""
    with np.errstate(over="ignore"):  # `write_weights` looks for what became infinite
        return {
            name: np.asarray(value, np.float16 if _is_halved(name, value.shape) else None, "C")
            for name, value in state.items()
            if not name.startswith(SLOW_CRITIC)
        }


def _is_halved(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith(DECODER) and len(shape) > 1


def _in_order(content: bytes) -> bytes:
    """Put the metadata in order: safetensors writes it in another order each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of everything in a file but this digest itself."""
    covered = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(canonical_json(covered).encode())
    for name, (dtype, shape) in sorted(shapes_of(tensors).items()):
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------------


def read_weights(path: Path) -> Weights:
    """Read a weights file, whoever made it.

    Raises:
        WeightsError: when there is none, or it is damaged or no such file.
        OtherCode: when it is whole, but not of an agent that today's code builds.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if not 0 < length <= HEADER_LIMIT:
            raise ValueError(f"a header of {length} bytes")
        with safe_open(path, framework="numpy") as file:
            metadata = Metadata.model_validate(file.metadata())
            recipe = _recipe(path, metadata)
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {n: (p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()}
            check_tensors(path, recipe, shapes, metadata.git_commit)
            tensors = {name: file.get_tensor(name) for name in parts}
    except SafetensorError:
        raise _damaged(path, ValueError("its header and its contents do not fit")) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if _digest(metadata.model_dump(), tensors) != metadata.sha256:
        raise _damaged(path, ValueError("its contents do not match its checksum"))
    return Weights(path, metadata, recipe, tensors)


def _recipe(path: Path, metadata: Metadata) -> Recipe:
    if sha256_text(metadata.recipe) != metadata.fingerprint:
        raise ValueError("its recipe does not match its fingerprint")
    recorded = parse_json(metadata.recipe)
    if not isinstance(recorded, dict):
        raise ValueError("its recipe is none")
    return known_recipe(recorded, str(path), metadata.git_commit)


def read_weights_of(run: RecordedRun) -> Weights:
    """Read the weights in a run's folder and hold them to the run's record.

    Raises:
        WeightsError: when they are damaged, another run's, or from another checkpoint than the
            recorded one.
        OtherCode: as `read_weights`.
    """
    path = run.weights
    weights = read_weights(path)
    if weights.metadata.fingerprint != run.fingerprint:
        raise WeightsError(
            f"{path}: of run {weights.metadata.fingerprint[:SHORT]}, not of this one. "
            "`git checkout` brings the run's own back"
        )
    if weights.metadata.checkpoint_sha256 != run.checkpoint.sha256:
        raise WeightsError(
            f"{path}: from another checkpoint than {run.path.name} recorded. `git checkout` brings "
            "both back"
        )
    return weights


def shapes_of(tensors: Mapping[str, np.ndarray | torch.Tensor]) -> Shapes:
    """Return dtype, as safetensors calls it, and shape of every array."""
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    return {
        name: (DTYPES.get(dtype, dtype), tuple(tensors[name].shape))
        for name, dtype in dtypes.items()
    }


def check_tensors(place: Path, recipe: Recipe, found: Shapes, commit: str | None) -> None:
    """Hold tensors that were recorded at a commit to those of a recipe's agent.

    The agent is built without memory for its tensors, so that a recipe can ask for any size. The
    slow critic's are left out on both sides, and the decoder's precision is passed over.

    Raises:
        OtherCode: when they differ, saying how.
    """
    with torch.device("meta"):
        agent = new_agent(recipe)
    own, found = (
        {
            name: ("F16" if dtype == "F32" and _is_halved(name, shape) else dtype, shape)
            for name, (dtype, shape) in shapes.items()
            if not name.startswith(SLOW_CRITIC)
        }
        for shapes in (shapes_of(agent.state_dict()), found)
    )
    problems = [
        *(f"{name} is missing" for name in own.keys() - found.keys()),
        *(f"{cut(name)} is unknown" for name in found.keys() - own.keys()),
        *(
            f"{name} is {found[name][0]} {list(found[name][1])}, not {shape[0]} {list(shape[1])}"
            for name, shape in own.items()
            if found.get(name, shape) != shape
        ),
    ]
    if problems:
        raise OtherCode(
            f"{place}: not the tensors of the agent that today's code builds from its recipe: "
            f"{few(sorted(problems))}. The code of commit {short_commit(commit or 'unknown')} may "
            "build it"
        )


def same_tensors(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Say whether two agents' tensors are equal, bit for bit, as a file holds them."""
    return _digest({}, _stored(one)) == _digest({}, _stored(other))


def _damaged(path: Path, error: Exception) -> WeightsError:
    part = "its metadata: " if isinstance(error, ValidationError) else ""
    return WeightsError(
        f"{path}: not a whole file of weights ({part}{reason(error)}). Fetch it anew, "
        "`git checkout` it, or `drama export` it where the checkpoint is"
    )
