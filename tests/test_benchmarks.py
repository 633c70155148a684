"""Benchmarks at toy size: every part measures, is stored, compared and shown; no times asserted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts find each other as in `make bench`

# ruff: noqa: E402
import bench
import learned
import measuring
import records
import soak
import training
import updates
from measuring import Figure, Machine
from records import Measured
from scaling import imagination, memory, parquet, replay, sequence

from drama.pipeline.config import load_preset

CPU = torch.device("cpu")
MACHINE = Machine("cpu", "Toy, 2 cores", "2.0", "2026-01-31", "abc", 100.0)
TOY = {
    "updates": partial(updates.measure, preset="quick", rounds=1),
    "sequence": partial(
        sequence.measure,
        points=sequence.Points(preset="quick", batch=1, lengths=(16, 32), rounds=1),
    ),
    "imagination": partial(
        imagination.measure,
        points=imagination.Points(
            preset="quick", horizons=(2, 4), batches=(2, 4), contexts=2, horizon=2, rounds=1
        ),
    ),
    "replay": partial(
        replay.measure,
        points=replay.Points(preset="quick", sizes=(100, 200), read_from=50, rounds=1),
    ),
    "parquet": partial(
        parquet.measure,
        points=parquet.Points(preset="quick", games=("Pong",), steps=50, tail=20, rounds=1),
    ),
    "memory": partial(memory.measure, points=memory.Points(preset="quick")),
    "training": partial(
        training.measure,
        points=training.Points(
            preset="quick", stored=100, warm=1, steps=2, equal=2, side_by_side=(2,)
        ),
    ),
}


@pytest.fixture(autouse=True)
def a_light_reference_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is repeated."""
    monkeypatch.setattr(measuring, "REFERENCE_WIDTH", 64)
    monkeypatch.setattr(measuring.take_turns, "__defaults__", (1, 0.0))


@pytest.fixture
def toy_peak(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stand for what runs in processes of its own, which take seconds to start."""
    calls: list[tuple[object, ...]] = []

    def call(work: Callable[..., int], *arguments: object) -> int:
        calls.append(arguments)
        return work(*arguments) + measuring.MIB  # a process that has freed nothing yet needs more

    monkeypatch.setattr(sequence, "in_fresh_process", call)
    return calls


def figures(part: str) -> list[Figure]:
    found = list(TOY[part](CPU))
    assert all(np.isfinite(figure.value) for figure in found)
    keys = [figure.key for figure in found]
    assert len(keys) == len(set(keys)), "two figures could not be told apart in another run"
    assert {figure.part for figure in found} == {part}
    return found


def named(found: list[Figure], name: str) -> list[Figure]:
    return [figure for figure in found if figure.name == name]


def measured(*figures: Figure, date: str = "2026-01-31") -> dict[str, Measured]:
    parts: dict[str, Measured] = {}
    for part in dict.fromkeys(figure.part for figure in figures):
        own = tuple(figure for figure in figures if figure.part == part)
        parts[part] = Measured(replace(MACHINE, date=date), 1.0, own)
    return parts


def seconds(part: str, value: float, ratio: float, headline: str = "") -> Figure:
    return Figure(part, "work", {"size": 10}, value, "s", ratio, headline=headline)


# --- the parts ---------------------------------------------------------------------------------


def test_every_part_has_a_toy() -> None:
    assert TOY.keys() == bench.PARTS.keys()


def test_sequence_models_are_compared_at_equal_parameter_count() -> None:
    settings = load_preset("xs", folder=measuring.PRESETS).settings()
    counts = [sequence.parameter_count(kind, settings) for kind in sequence.KINDS]
    assert max(counts) <= 1.03 * min(counts)
    models = [sequence.sequence_model(kind, settings) for kind in sequence.KINDS]
    assert [type(model.mixers[0]).__name__ for model in models] == ["Mamba2", "Attention", "GRU"]
    assert {model.width for model in models} == {512}


def test_lengths_double(toy_peak: list[tuple[object, ...]]) -> None:
    assert {longer / shorter for shorter, longer in pairwise(sequence.Points().lengths)} == {2}
    found = figures("sequence")
    times = {
        (f.parameters["kind"], f.parameters["length"]): f.value for f in named(found, "update")
    }
    for figure in named(found, "time per doubling"):
        kind = figure.parameters["kind"]
        assert figure.value == times[kind, 32] / times[kind, 16]
        assert figure.limit == (2.2 if kind == "mamba2" else None)
    assert {call[0] for call in toy_peak} == set(sequence.KINDS)
    assert len(named(found, "peak memory")) == len(toy_peak) == 6


def test_the_sequence_inputs_are_one_hot() -> None:
    update = sequence.SequenceUpdate("gru", "quick", CPU)
    inputs = update.inputs(2, 5)  # K = 8 latents of 8 classes, and the action
    assert inputs.shape == (2, 5, 64 + sequence.ACTIONS)
    assert (inputs.unflatten(-1, (-1, 1)).sum((-1, -2)) == 8 + 1).all()
    before = [p.clone() for p in update.model.parameters()]
    update(inputs)
    after = update.model.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_updates_are_timed_on_both_paths() -> None:
    found = figures("updates")
    for path in ("plain", "fast"):
        taken = {f.name: f.value for f in found if f.parameters.get("path") == path}
        parts = ("world-model update", "imagination", "behaviour update")
        assert taken["together"] == pytest.approx(sum(taken[part] for part in parts))
    assert named(found, "together, fast over plain")
    assert named(found, "behaviour update, operations")[0].value == pytest.approx(
        behaviour_operations() / 1e12
    )


def behaviour_operations() -> int:
    """Critic and actor forward and back, the slow critic forward; two a multiplication."""
    settings = load_preset("quick").settings()
    model, behaviour = settings.world_model, settings.behaviour
    state = model.categoricals * model.classes + settings.sequence_model.width

    def products(hidden: int, outputs: int) -> tuple[int, int]:
        """Of a row forward, and of the first layer alone, whose input needs no gradient."""
        between = (behaviour.layers - 1) * hidden * hidden
        return state * hidden + between + hidden * outputs, state * hidden

    rows = behaviour.contexts * behaviour.horizon
    critic, critic_first = products(behaviour.critic_hidden, model.bins)
    actor, actor_first = products(behaviour.actor_hidden, updates.ACTIONS)
    critics = (rows + behaviour.contexts) * (4 * critic - critic_first)
    return 2 * (critics + rows * (3 * actor - actor_first))


def test_imagination_is_timed_along_both_axes() -> None:
    found = figures("imagination")
    points = {(f.parameters["contexts"], f.parameters["horizon"])
              for f in named(found, "imagination")}  # fmt: skip
    assert points == {(2, 2), (2, 4), (4, 2)}
    along = [f.parameters["along"] for f in named(found, "time per doubling")]
    assert along == ["horizon", "contexts"]


def test_draws_and_reads_are_timed_apart() -> None:
    found = figures("replay")
    sizes = {(f.parameters["kind"], f.parameters["transitions"]) for f in named(found, "draw")}
    kinds = ("world model", "imagination")
    assert sizes == {(kind, size) for kind in kinds for size in (100, 200)}
    assert {f.parameters["transitions"] for f in named(found, "read")} == {50}


def test_the_first_size_of_a_replay_is_what_a_first_batch_needs() -> None:
    settings = load_preset("xs", folder=measuring.PRESETS).settings()
    assert replay.Points().sizes[0] == settings.training.random_steps


def test_filled_replay_holds_noise_in_order() -> None:
    buffer = replay.ReplayBuffer(30, (2, 2, 3))
    assert list(replay.fill(buffer, 30)) == [30]
    columns = buffer.columns(0, 30)
    assert columns["step"].tolist() == list(range(30))
    assert columns["frame"].std() > 50


def test_files_are_measured_on_a_game_that_was_played() -> None:
    found = figures("parquet")
    size = named(found, "size")[0].value
    assert 10 < size < 3 * 64 * 64, "a frame of Pong is smaller in a file than in memory"
    share = named(found, "writing replay, share of a run at 10 ms a step")[0]
    rate = named(found, "writing")[0].value  # MB/s
    raw = 64 * 64 * 3 + 8 + 4 + 2 + 4 + 3  # bytes of a transition
    of_run = 1000 * raw / 1e6 / rate / 10  # preset quick: 1000 steps, wanted in 10 s
    assert share.value == pytest.approx(100 * of_run)
    assert share.limit == 2
    save = named(found, "checkpoint")[0].value  # s, every five minutes
    share = named(found, "saving checkpoints, share of a run")[0]
    assert share.value == pytest.approx(100 * save / 300) and share.limit == 2


def test_a_whole_runs_memory_is_followed_in_a_process_of_its_own() -> None:
    held = {figure.name: figure.value for figure in figures("memory")}
    replay_bytes = 1000 * 64 * 64 * 3 / measuring.MIB
    assert held["replay full"] - held["agent and optimisers"] > 0.5 * replay_bytes
    assert held["peak in a step"] >= held["after a step"] > held["libraries"]
    assert held["checkpoint's file"] > 0.9 * replay_bytes, "noise lies in the checkpoint"


def test_added_peak_counts_what_was_freed_again() -> None:
    def hold_for_a_moment() -> None:
        np.ones(64 * measuring.MIB, np.uint8)  # freed at once

    assert measuring.added_peak(hold_for_a_moment, CPU) > 60 * measuring.MIB
    assert measuring.added_peak(lambda: None, CPU) < measuring.MIB


def test_work_is_repeated_until_it_can_be_timed() -> None:
    calls: list[None] = []
    taken = measuring.seconds(lambda: calls.append(None), CPU, least=0.001)
    assert len(calls) > 10 and taken * len(calls) >= 0.001


# --- storing and comparing -----------------------------------------------------------------------


def test_figures_survive_their_file(tmp_path: Path) -> None:
    figure = Figure("a", "work", {"kind": "x", "size": 3}, 1.5, "s", 0.25, limit=2.0, headline="it")
    parts = measured(figure, Figure("b", "bytes", {}, 12.0, "MiB"))
    records.write(tmp_path / "toy.json", parts)
    assert records.read(tmp_path / "toy.json") == parts
    assert records.read(tmp_path / "none.json") == {}
    (tmp_path / "toy.json").write_text('{"format": 1, "parts": {"a": {}}}')
    with pytest.raises(records.RecordError, match=r"toy\.json: not a benchmark's figures"):
        records.read(tmp_path / "toy.json")


def test_a_slowed_figure_is_named_and_a_slower_machine_is_not() -> None:
    before = measured(seconds("a", 1.0, 10.0), seconds("b", 1.0, 10.0), seconds("c", 1.0, 10.0))
    # a: the machine is twice as slow; b: the work is; c: the work got faster.
    now = measured(seconds("a", 2.0, 10.5), seconds("b", 2.0, 20.0), seconds("c", 1.0, 5.0))
    changes = records.compare(before, now)
    assert [(change.figure.part, change.worse) for change in changes] == [("b", True), ("c", False)]
    assert str(changes[0]) == "worse: b: work (size 10): 2.00 times the stored figure"


def test_a_lower_rate_is_worse_and_a_new_figure_is_no_change() -> None:
    rate = Figure("a", "writing", {}, 100.0, "MB/s", 10.0)
    before, now = measured(rate), measured(replace(rate, ratio=5.0), seconds("b", 1.0, 1.0))
    assert [change.worse for change in records.compare(before, now)] == [True]


def test_what_is_not_as_wanted_is_found() -> None:
    within, beyond = (
        Figure("a", "share", {"game": str(value)}, value, "%", limit=2.0) for value in (2.0, 2.1)
    )
    assert records.beyond_limits(measured(within, beyond)) == [beyond]


def test_the_readmes_table_has_a_row_per_headline_and_empty_cells_without_a_gpu() -> None:
    parts = measured(seconds("a", 1.234, 5.6, "the work"), seconds("b", 1.0, 1.0))
    parts["a"] = replace(parts["a"], machine=replace(MACHINE, date="2026-02-01"))
    text = records.markdown([parts])
    assert "Toy, 2 cores: 2026-01-31 to 2026-02-01, PyTorch 2.0" in text
    assert "No GPU was at hand" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| what | Toy, 2 cores | ratio | GPU | ratio |"
    assert lines[2:] == ["| the work | 1.23 s | 5.6 |  |  |"]


def test_what_a_gpu_is_wanted_for_has_a_row_before_one_was_at_hand() -> None:
    """And they are the names under which it is measured."""
    points = training.Points(preset="quick", stored=100, warm=1, steps=1, equal=1, side_by_side=())
    wanted = training.headlines(points)
    here = {figure.headline for figure in training.measure(CPU, points)}
    assert [row for row in wanted if row not in here] == ["memory reserved on the GPU, fast"]
    table = records.markdown([measured(seconds("work", 1.0, 2.0, "the work"))], wanted)
    assert f"| {wanted[0]} |  |  |  |  |" in table


def test_a_gpus_cells_are_filled_when_it_was_measured() -> None:
    on_cpu = measured(seconds("a", 1.0, 5.0, "the work"))
    fast = Figure("a", "work", {}, 0.5, "s", 4.0, headline="the work")
    memory = Figure("a", "memory", {}, 100.0, "MiB", limit=8192.0, headline="memory")
    machine = replace(MACHINE, kind="cuda", device="NVIDIA Toy")
    on_gpu = {"a": Measured(machine, 1.0, (fast, memory))}
    text = records.markdown([on_gpu, on_cpu])
    assert "No GPU was at hand" not in text
    assert "| what | Toy, 2 cores | ratio | NVIDIA Toy | ratio |" in text
    assert "| the work | 1 s | 5 | 0.5 s | 4 |" in text
    assert "| memory |  |  | 100 MiB (≤ 8,192 wanted) |  |" in text


# --- the command --------------------------------------------------------------------------------


def simple(part: str, value: float) -> bench.Part:
    def measure(device: torch.device) -> Iterator[Figure]:
        yield seconds(part, value, value)

    return bench.Part(measure)


def broken(device: torch.device) -> Iterator[Figure]:
    yield seconds("b", 1.0, 1.0)
    raise RuntimeError("the disk is full")


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, list[float]]]]:
    """Run the command; returns its exit code and the stored values by part."""
    monkeypatch.setattr(bench, "PARTS", {"a": simple("a", 1.0), "b": simple("b", 1.0)})
    monkeypatch.setattr(bench, "UNSTORED", tmp_path / "unstored")
    name = measuring.slug(measuring.device_name(CPU))

    def call(*arguments: str) -> tuple[int, dict[str, list[float]]]:
        code = bench.main([*arguments, "--device", "cpu", "--results", str(tmp_path)])
        stored = records.read(tmp_path / f"{name}.json")
        values = {part: [f.value for f in found.figures] for part, found in stored.items()}
        return code, values

    return call


def test_a_run_is_stored_with_a_picture(
    command: Callable[..., tuple[int, object]], tmp_path: Path
) -> None:
    assert command() == (0, {"a": [1.0], "b": [1.0]})
    picture = next(tmp_path.glob("*.svg")).read_text(encoding="utf-8")
    assert picture.count("not measured") == 6 and "prefers-color-scheme" in picture


def test_a_partial_run_keeps_the_other_parts_and_says_what_changed(
    command: Callable[..., tuple[int, object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command()
    monkeypatch.setitem(bench.PARTS, "a", simple("a", 3.0))
    assert command("--parts", "a") == (0, {"a": [3.0], "b": [1.0]})
    assert "worse: a: work (size 10): 3.00 times the stored figure" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_costs_nothing_else(
    command: Callable[..., tuple[int, object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    command()
    monkeypatch.setattr(
        bench, "PARTS", {"b": bench.Part(broken), "a": simple("a", 3.0), "c": simple("c", 5.0)}
    )
    assert command() == (1, {"a": [1.0], "b": [1.0]}), "what was stored stays"
    output = capsys.readouterr().out
    assert "b failed: the disk is full" in output and "failed: b;" in output
    unstored = json.loads(next((tmp_path / "unstored").glob("*.json")).read_text())["parts"]
    assert [unstored[part]["figures"][0]["value"] for part in ("a", "b", "c")] == [3.0, 1.0, 5.0]


def test_a_dry_run_leaves_what_is_stored(
    command: Callable[..., tuple[int, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    monkeypatch.setitem(bench.PARTS, "a", simple("a", 3.0))
    assert command("--dry") == (0, {"a": [1.0], "b": [1.0]})


def test_a_part_for_other_devices_is_passed_over(
    command: Callable[..., tuple[int, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.PARTS, "a", replace(simple("a", 1.0), devices=("cuda",)))
    assert command() == (0, {"b": [1.0]})


def test_an_unknown_part_is_refused(
    command: Callable[..., tuple[int, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        command("--parts", "a,d")
    assert refused.value.code == 2
    assert "no part d; parts are a, b" in capsys.readouterr().err


def test_the_markdown_command_prints_what_is_stored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records.write(tmp_path / "toy.json", measured(seconds("updates", 1.0, 2.0, "the work")))
    assert bench.main(["--markdown", "--results", str(tmp_path)]) == 0
    assert "| the work | 1 s | 2 |  |  |" in capsys.readouterr().out


def test_the_picture_shows_every_part(toy_peak: list[tuple[object, ...]], tmp_path: Path) -> None:
    from drawing import draw

    parts = {
        part: Measured(MACHINE, 1.0, tuple(figures(part)))
        for part in ("updates", "sequence", "imagination", "replay")
    }
    run = tuple(Figure("memory", name, {}, 500.0, "MiB") for name in ("libraries", "replay full"))
    parts["memory"] = Measured(MACHINE, 1.0, run)
    draw(tmp_path / "toy.svg", parts)
    picture = (tmp_path / "toy.svg").read_text(encoding="utf-8")
    assert "not measured" not in picture
    for text in ("Mamba-2", "transformer", "GRU", "by horizon", "plain", "fast", "replay full"):
        assert text in picture


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Intel Xeon, 2 cores", "intel-xeon-2-cores"), ("NVIDIA H200", "nvidia-h200")],
)
def test_a_devices_file_is_named_after_it(name: str, expected: str) -> None:
    assert measuring.slug(name) == expected


def test_a_processors_name_is_cleared_of_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measuring, "_processor", lambda: "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    )
    assert measuring.device_name(CPU) == "Intel Xeon Platinum 8481C, 1 core"


def test_an_earlier_commit_is_timed_beside_todays_code() -> None:
    """Each in processes of its own; the commit is the last one, whose files are taken from git."""
    import laptop

    times = dict((part, (before, now)) for part, before, now in laptop.gains("HEAD", "quick", 1))
    assert list(times) == [*laptop.PARTS, "together"]
    assert all(before > 0 and now > 0 for before, now in times.values())
    assert times["together"][0] == sum(times[part][0] for part in laptop.PARTS)


def test_a_commit_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--against", "nonsense", "--parts", "laptop", "--dry"])
    assert "--against nonsense: no such commit here" in capsys.readouterr().err


def test_what_was_learned_anew_stands_beside_what_git_keeps(tmp_path: Path) -> None:
    scores = Path("catch/report/scores.parquet")
    kept = pq.read_table(ROOT / learned.KEPT / scores)
    (tmp_path / scores).parent.mkdir(parents=True)
    fresh = kept.slice(1, 1).set_column(
        kept.schema.get_field_index("mean_return"), "mean_return", [[0.25]]
    )
    pq.write_table(fresh, tmp_path / scores)
    table = learned.beside(tmp_path, ROOT / learned.KEPT)
    assert table.to_numpy().tolist() == [["catch", "Catch8", 1, 1.0, 0.25]]


@pytest.mark.whole
def test_a_soak_looks_at_a_real_run_until_its_ring_was_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "1", "--ring", "100"])
    monkeypatch.setattr(soak, "LOOKS", 12)
    soak.main()
    *_, memory, files, disk = capsys.readouterr().out.splitlines()
    for line, name, unit in (
        (memory, "memory", "MB"), (files, "files", "descriptors"), (disk, "disk", "MB"),
    ):  # fmt: skip
        begun, change = line.rsplit(": ", 1)
        first, second = (float(number) for number in re.findall(r"[0-9.]+", begun))
        assert begun.startswith(f"{name}: {first:.2f} {unit} on average, then")
        assert float(change) == pytest.approx(second - first, abs=0.011)
    assert "descriptors on average, then" in files and float(files.rsplit(": ", 1)[1]) < 1
