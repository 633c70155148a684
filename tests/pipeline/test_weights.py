"""Exported weights: what is in them, that damage is noticed, that they play; `drama.load`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from workspace import GAME, SEED, Workspace

import drama
from drama.agent.evaluation import build_agent
from drama.errors import ConfigurationError, DramaError
from drama.files import canonical_json, sha256_file, sha256_text
from drama.pipeline.artifacts import weights as module
from drama.pipeline.artifacts.export import export
from drama.pipeline.artifacts.records import (
    OtherCode,
    RecordedRun,
    evaluations_of,
    read_record,
)
from drama.pipeline.artifacts.verify import Finding, verify
from drama.pipeline.artifacts.weights import WeightsError, read_weights, write_weights
from drama.pipeline.jobs import evaluate_run
from drama.pipeline.recipes import read_evaluation_recipe, read_recipe
from drama.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
DEEP = "[" * 60_000


@pytest.fixture(scope="module")
def exported(undisturbed: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole run with its weights; leave it as it is."""
    workspace = Workspace(tmp_path_factory.mktemp("exported") / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    workspace.run("export", str(workspace.recipe))
    return workspace


@pytest.fixture
def copy(exported: Workspace, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(exported.root, workspace.root)
    return workspace


@pytest.fixture(scope="module")
def content(exported: Workspace) -> bytes:
    return weights(exported).read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def weights(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("weights-*.safetensors")
    return path


def run_of(workspace: Workspace) -> RecordedRun:
    (path,) = workspace.folder.glob("run-*.json")
    return read_record(path)


def state_of(workspace: Workspace) -> dict[str, Any]:
    checkpoint = workspace.folder / "checkpoint.parquet"
    return dict(load_checkpoint(checkpoint, run_of(workspace).fingerprint)["agent"])


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return the file with its header changed, in safetensors' own layout."""
    header, data = header_of(content)
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def signed(content: bytes, change: Callable[[dict[str, str]], None]) -> bytes:
    """Return the file with its metadata changed by somebody who corrects the checksum."""

    def both(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        change(metadata)
        metadata["sha256"] = module._digest(metadata, tensors)

    tensors = load(content)
    return with_header(content, both)


# --- what is written -----------------------------------------------------------------------------


def test_the_file_holds_what_playing_needs_and_where_it_comes_from(
    exported: Workspace, content: bytes
) -> None:
    run, state = run_of(exported), state_of(exported)
    metadata, tensors = header_of(content)[0]["__metadata__"], load(content)
    slow = {name for name in state if name.startswith("behaviour.slow_critic.")}
    assert slow and tensors.keys() == state.keys() - slow
    for name, tensor in tensors.items():
        wanted = state[name]
        if name.startswith("world_model.decoder.") and wanted.ndim > 1:
            wanted = wanted.astype(np.float16)
        assert tensor.dtype == wanted.dtype, name
        np.testing.assert_array_equal(tensor, wanted)
    assert metadata["recipe"] == exported.recipe.read_text(encoding="utf-8")
    assert metadata["fingerprint"] == sha256_text(metadata["recipe"]) == run.fingerprint
    assert metadata["checkpoint_sha256"] == sha256_file(exported.folder / "checkpoint.parquet")
    assert json.loads(metadata["versions"]) == run.record.versions
    assert weights(exported).name == f"weights-{run.fingerprint[:16]}.safetensors"


def test_a_weight_that_half_precision_cannot_hold_is_not_exported(copy: Workspace) -> None:
    state, path = state_of(copy), weights(copy)
    before = path.read_bytes()
    name = "world_model.decoder.features.weight"
    state[name] = np.where(state[name] == state[name].max(), np.float32(1e5), state[name])
    with pytest.raises(WeightsError, match="not finite"):
        write_weights(run_of(copy), state)
    assert path.read_bytes() == before


def test_exporting_again_gives_the_same_bytes(copy: Workspace) -> None:
    before = {path: path.read_bytes() for path in copy.folder.glob("weights-*")}
    assert len(before) == 2
    for path in before:
        path.unlink()
    export(copy.folder)  # in another process than before
    assert {path: path.read_bytes() for path in before} == before
    metadata = header_of(weights(copy).read_bytes())[0]["__metadata__"]
    assert list(metadata) == sorted(metadata), "safetensors itself has another order each time"


def test_the_card_says_what_it_is_how_it_scored_and_how_to_play(exported: Workspace) -> None:
    card = weights(exported).with_suffix(".md").read_text(encoding="utf-8")
    run = run_of(exported)
    (evaluation,) = evaluations_of(run)
    score = evaluation.score.mean_return
    assert card.startswith(f"# {GAME}, preset tiny, seed {SEED}\n")
    for said in (
        "160 agent steps", "not the authors' weights", "no reproduction", run.fingerprint,
        str(run.record.git_commit), run.checkpoint.sha256, sha256_file(weights(exported)),
        "| greedy | cpu | 5 | ", f"| {score:g} |", f'"total_steps": {160}',
        run.record.versions["torch"],
    ):  # fmt: skip
        assert said in card, said
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    printed: list[Any] = []
    exec(code.replace('load("', f'load("{exported.folder}/'), {"print": printed.append})
    assert [episode.index for episode in printed[0]] == [0]


def test_nothing_is_exported_of_no_whole_run_or_several(copy: Workspace) -> None:
    shutil.copytree(copy.folder, copy.folder.with_name("seed10"))
    with pytest.raises(ConfigurationError, match=r"2 whole runs there"):
        export(copy.root / "results")
    next(copy.folder.glob("run-*.json")).unlink()
    assert "no whole run there" in copy.run("export", str(copy.folder), expected=2)


def test_nothing_is_exported_of_another_checkpoint(copy: Workspace) -> None:
    weights(copy).unlink()
    checkpoint = copy.folder / "checkpoint.parquet"
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        export(copy.folder)
    checkpoint.unlink()
    with pytest.raises(WeightsError, match=f"not here; `dvc pull train@{GAME}-{SEED}`"):
        export(copy.folder)
    assert not list(copy.folder.glob("weights-*.safetensors"))


def test_the_card_alone_is_written_anew_where_the_weights_are_all_there_is(copy: Workspace) -> None:
    before = {path: path.read_bytes() for path in copy.folder.glob("weights-*")}
    (copy.folder / "checkpoint.parquet").unlink()
    weights(copy).with_suffix(".md").write_text("another")
    assert set(export(copy.recipe)) == before.keys()
    assert {path: path.read_bytes() for path in before} == before
    weights(copy).write_bytes(before[weights(copy)][:-1])
    with pytest.raises(WeightsError, match="not a whole file"):
        export(copy.recipe)


def test_nothing_is_exported_that_does_not_read_back(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(copy).read_bytes()
    usual = module.save
    monkeypatch.setattr(
        module, "save", lambda tensors, metadata: usual(tensors, metadata)[:-1] + b"?"
    )
    with pytest.raises(WeightsError, match="not a whole file"):
        export(copy.folder)
    assert weights(copy).read_bytes() == before
    assert not list(copy.folder.glob(".*.part"))


def test_tensors_that_are_not_the_agents_are_not_exported(copy: Workspace) -> None:
    state = state_of(copy)
    del state["behaviour.actor.net.0.bias"]
    with pytest.raises(OtherCode, match=r"behaviour\.actor\.net\.0\.bias is missing"):
        write_weights(run_of(copy), state)


# --- damage, and what strangers write ------------------------------------------------------------


def test_every_flipped_byte_is_noticed(content: bytes, place: Path) -> None:
    length = 8 + int.from_bytes(content[:8], "little")
    spots = [*range(0, length, 211), *range(length, len(content), 20_011), len(content) - 1]
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1
        place.write_bytes(damaged)
        with pytest.raises(DramaError, match=place.name):
            read_weights(place)


@pytest.mark.parametrize("size", [0, 7, 8, 1000, -1])
def test_a_cut_file_is_refused(content: bytes, place: Path, size: int) -> None:
    place.write_bytes(content[:size])
    with pytest.raises(WeightsError, match=r"not a whole file of weights .* `drama export`"):
        read_weights(place)


def test_no_file_a_long_header_and_other_files_are_refused(place: Path) -> None:
    with pytest.raises(WeightsError, match="not found"):
        read_weights(place)
    place.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="a header of 4611686018427387904 bytes"):
        read_weights(place)
    place.write_bytes(module.save({"a": np.zeros(3)}))
    with pytest.raises(WeightsError, match="its metadata"):
        read_weights(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format="2"), "format"),
        (lambda m: m.pop("checkpoint_sha256"), "checkpoint_sha256"),
        (lambda m: m.update(checkpoint_sha256="0" * 63), "checkpoint_sha256"),
        (lambda m: m.update(more="1"), "more"),
        (lambda m: m.update(recipe="x" * 70_000), "recipe"),
        (lambda m: m.update(recipe="{}"), "does not match its fingerprint"),
        (lambda m: m.update(recipe="[]", fingerprint=sha256_text("[]")), "its recipe is none"),
        (lambda m: m.update(recipe=DEEP, fingerprint=sha256_text(DEEP)), "nested too deeply"),
    ],
)
def test_metadata_is_parsed_before_it_is_used(
    content: bytes, place: Path, change: Callable[[dict[str, str]], None], said: str
) -> None:
    place.write_bytes(signed(content, change))
    with pytest.raises(WeightsError, match=said):
        read_weights(place)


def with_settings(content: bytes, **more: Any) -> bytes:
    def change(metadata: dict[str, str]) -> None:
        recipe = json.loads(metadata["recipe"])
        for key, value in more.items():
            section, name = key.split("__")
            recipe["settings"][section][name] = value
        metadata["recipe"] = canonical_json(recipe)
        metadata["fingerprint"] = sha256_text(metadata["recipe"])

    return signed(content, change)


def test_a_recipe_can_ask_for_any_size_and_gets_no_memory(content: bytes, place: Path) -> None:
    size = 65_536  # 2 ** 48 bytes for one matrix alone
    big = {"behaviour__critic_hidden": size, "sequence_model__width": size,
           "world_model__categoricals": size, "world_model__classes": size}  # fmt: skip
    place.write_bytes(with_settings(content, **big))
    with pytest.raises(OtherCode, match=r"not F32 \[32, 4295032832\]"):
        read_weights(place)


def test_settings_that_do_not_go_together_are_refused(content: bytes, place: Path) -> None:
    place.write_bytes(with_settings(content, world_model__strides=[3, 2, 2]))
    with pytest.raises(OtherCode, match=r"must divide environment\.image_size"):
        read_weights(place)


def test_tensors_that_are_not_the_recipes_are_named(content: bytes, place: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        header["behaviour.spy"] = header.pop("behaviour.actor.net.0.bias")

    def reshape(header: dict[str, Any]) -> None:
        entry = header["behaviour.actor.net.0.weight"]
        entry["shape"] = entry["shape"][::-1]

    place.write_bytes(with_header(content, rename))
    with pytest.raises(OtherCode, match=r"net\.0\.bias is missing, behaviour\.spy is unknown"):
        read_weights(place)
    place.write_bytes(with_header(content, reshape))
    with pytest.raises(OtherCode, match=r"net\.0\.weight is F32 \[\d+, 32\], not F32 \[32, \d+\]"):
        read_weights(place)


# --- playing -------------------------------------------------------------------------------------


def test_a_loaded_agent_is_the_checkpoints(exported: Workspace) -> None:
    run = read_recipe(exported.recipe)
    state = load_checkpoint(exported.folder / "checkpoint.parquet", run.fingerprint)["agent"]
    own = build_agent(run.recipe, state, CPU)
    for place in (weights(exported), exported.folder, exported.recipe, str(exported.folder)):
        loaded = drama.load(place)
        assert (loaded.recipe, loaded.fingerprint) == (run.recipe, run.fingerprint)
        assert not loaded.agent.training
        for name, value in loaded.agent.state_dict().items():
            wanted = own.state_dict()[name]
            if loaded.source.suffix == ".safetensors" and "slow_critic" in name:
                wanted = own.state_dict()[name.replace("slow_critic", "critic")]
            if loaded.source.suffix == ".safetensors" and name.startswith("world_model.decoder."):
                assert value.dtype == wanted.dtype
                torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-7)
                continue
            assert torch.equal(value, wanted), name


def evaluate(workspace: Workspace) -> Path:
    """What `drama evaluate` does, in this process."""
    run = read_recipe(workspace.recipe)
    return evaluate_run(run, read_evaluation_recipe(run), CPU, threads=1)


def test_without_a_checkpoint_the_weights_play_the_recorded_evaluation(
    copy: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    (evaluation,) = copy.folder.glob("evaluation-*.parquet")
    before = evaluation.read_bytes()
    (copy.folder / "checkpoint.parquet").unlink()
    evaluation.unlink()
    assert evaluate(copy) == evaluation
    assert f"{weights(copy).name}: plays" in capsys.readouterr().err
    assert evaluation.read_bytes() == before
    assert drama.load(copy.folder).source == weights(copy)


@pytest.mark.parametrize("what", ["recipe", "checkpoint"])
def test_another_runs_weights_are_not_this_ones(copy: Workspace, what: str) -> None:
    content = weights(copy).read_bytes()
    if what == "recipe":
        content = with_settings(content, behaviour__horizon=4)
    else:
        content = signed(content, lambda metadata: metadata.update(checkpoint_sha256="0" * 64))
    weights(copy).write_bytes(content)
    (copy.folder / "checkpoint.parquet").unlink()
    (evaluation,) = copy.folder.glob("evaluation-*.parquet")
    evaluation.unlink()
    said = "of run " if what == "recipe" else "from another checkpoint"
    assert not drama.load(weights(copy)).agent.training, "sound in itself"
    with pytest.raises(WeightsError, match=said):
        drama.load(copy.folder)
    with pytest.raises(WeightsError, match=said):
        evaluate(copy)
    assert not evaluation.exists()
    verdict = verify(run_of(copy).path, CPU)
    assert verdict.finding is Finding.DAMAGED and said in verdict.text


def test_without_either_the_way_to_get_them_is_told(copy: Workspace) -> None:
    weights(copy).unlink()
    (copy.folder / "checkpoint.parquet").unlink()
    with pytest.raises(WeightsError, match=r"neither checkpoint\.parquet nor weights-"):
        drama.load(copy.folder)


@pytest.mark.parametrize("device", ["cuda", "bogus"])
def test_a_device_that_is_not_there_is_refused_in_words(exported: Workspace, device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device '{device}': cannot be used here"):
        drama.load(exported.folder, device)


def test_a_loaded_run_is_short_to_look_at(exported: Workspace) -> None:
    loaded = drama.load(exported.folder)
    assert len(repr(loaded)) < 300 and run_of(exported).fingerprint in repr(loaded)
    assert "Generator" not in repr(loaded.play(episodes=1))


def test_a_checkpoint_of_an_earlier_step_plays_nothing(copy: Workspace) -> None:
    """It is this run's own and whole in itself, and not the one that the record names."""
    run = read_recipe(copy.recipe)
    path = run.folder / "checkpoint.parquet"
    state = load_checkpoint(path, run.fingerprint)
    next(value for value in state["agent"].values() if value.dtype == np.float32)[...] += 1
    save_checkpoint(path, run.fingerprint, state)
    read_evaluation_recipe(run).path.unlink()
    said = rf"checkpoint\.parquet: whole, but not the bytes that {run.record.name} recorded"
    with pytest.raises(CheckpointError, match=said):
        evaluate_run(run, read_evaluation_recipe(run), torch.device("cpu"), 1)
    for use in (drama.load, export):
        with pytest.raises(CheckpointError, match=said):
            use(run.folder)
