"""`drama record` and what follows from it: real DVC, real files, real kills."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from dvc.lock import Lock
from dvc_project import GAMES, STAGES, Clone, record_of, records, sha256
from test_pipeline import NOTHING

from drama.pipeline.artifacts.ledger import Recorded, record

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("ledger")]

CLEAN = "Data and pipelines are up to date."
SNAKEMAKE = ("snakemake", "--profile", "local")
CHECKPOINT = Path("results/tiny/runs/Pong/seed0/checkpoint.parquet")
# The real command, which a SIGKILL ends at one place: just before or just after a call.
KILLED = """
import os, signal, sys
import dvc.output
from drama.pipeline.artifacts import ledger, repository
place, when, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner, name = {
    "commit": (repository.Repository, "commit"), "replace": (os, "replace"),
    "cache": (dvc.output, "otransfer"), "link": (os, "link"),
    "write": (ledger, "write_ledger"),
}[place]
usual, seen = getattr(owner, name), 0

def struck(*arguments, **options):
    global seen
    seen += 1
    if seen == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    done = usual(*arguments, **options)
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return done

setattr(owner, name, struck)
sys.argv = ["drama", "record"]
from drama.cli import main
main()
"""


@pytest.fixture
def record_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clone], Recorded]:
    """`drama record` without a process of its own."""

    def run(clone: Clone) -> Recorded:
        monkeypatch.chdir(clone.root)
        return record()

    return run


def stages(clone: Clone) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(clone.lock())["stages"]
    return found


def status(clone: Clone) -> set[str]:
    """The stages that `dvc status` names."""
    return set(json.loads(clone.run("dvc", "status", "--json").splitlines()[-1]))


# --- recording -----------------------------------------------------------------------------------


def test_what_is_recorded_is_what_dvc_finds(recorded: Clone) -> None:
    assert CLEAN in recorded.run("dvc", "status")
    assert {f"train@{game}-0" for game in GAMES} < set(stages(recorded))
    for game in GAMES:
        assert recorded.present(game) == recorded.blobs(game)
        for name in recorded.blobs(game):
            file = (recorded.folder(game) / name).stat()
            assert not file.st_mode & 0o222 and file.st_nlink == 2, f"{name}: on disk twice"
    recorded.assert_cache_is_sound()


def test_a_second_time_changes_nothing(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    before = (project.root / "dvc.lock").stat()
    done = record_in(project)
    assert (done.recorded, done.notes, done.problems) == ([], [], [])
    after = (project.root / "dvc.lock").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_metrics_plots_and_the_graph_speak_of_the_report(project: Clone) -> None:
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))
    metrics = shown[""]["data"]["results/tiny/report/metrics.json"]["data"]
    assert set(metrics["human_normalised_score"]) == set(GAMES)
    assert {"mean", "median", "interquartile_mean", "optimality_gap"} < set(metrics)
    project.run("dvc", "plots", "show", "--quiet")
    page = (project.root / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert all(game in page for game in GAMES) and "human_normalised_score" in page
    assert project.git("status", "--porcelain") == ""
    graph = project.run("dvc", "dag", "--md", "report")
    assert len(re.findall(r"node\d+\[", graph)) == STAGES


def test_a_games_entry_concerns_that_game_and_the_report(project: Clone) -> None:
    project.replace("config/config.yaml", "Pong: {}", "Pong: {replay: {alpha: 0.5}}")
    project.run("drama", "plan")
    assert status(project) == {"train@Pong-0", "evaluate@Pong-0", "report"}
    before = stages(project)
    project.run("drama", "record")  # Pong's run is whole, but not today's
    assert stages(project) == before
    project.replace("config/config.yaml", "Pong: {replay: {alpha: 0.5}}", "Pong: {}")
    project.run("drama", "plan")
    assert status(project) == set()


def test_an_earlier_runs_score_is_not_kept_as_the_new_ones(project: Clone) -> None:
    project.replace("config/config.yaml", "Pong: {}", "Pong: {replay: {alpha: 0.5}}")
    project.run("drama", "plan")
    recipe = "results/tiny/recipes/Pong/seed0.json"
    project.run("drama", "train", recipe, "--device", "cpu")
    output = project.run("drama", "record")
    assert "dropped evaluate@Pong-0, which was of an earlier run" in output
    assert "evaluate@Pong-0" not in stages(project) and "train@Pong-0" in stages(project)
    project.run("dvc", "repro", "--dry", "--allow-missing")
    project.run("drama", "evaluate", recipe, "--device", "cpu")
    assert "evaluate@Pong-0" not in project.run("drama", "record", "results/tiny")
    assert "evaluate@Pong-0" in stages(project)


def test_results_that_git_ignores_are_not_recorded(fresh: Clone) -> None:
    fresh.append(".gitignore", "/results/tiny/\n")
    assert "ignored by git" in fresh.run("drama", "record")
    assert "ignored by git" in fresh.run("drama", "stages", expected=2)


def test_a_recipe_that_is_not_todays_is_left_out(
    fresh: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    recipe = fresh.root / "results/tiny/recipes/Pong/seed0.json"
    recipe.write_text(recipe.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    done = record_in(fresh)
    assert "train@Boxing-0" in done.recorded and "train@Pong-0" not in stages(fresh)
    assert any("recipes/Pong/seed0.json" in note and "drama plan" in note for note in done.notes)


def test_a_damaged_artifact_is_named_and_the_rest_recorded(fresh: Clone) -> None:
    damaged = fresh.folder("Pong") / "replay/part-00000.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    output = fresh.run("drama", "record", expected=1)
    assert str(damaged.relative_to(fresh.root)) in output and "train@Pong-0" in output
    assert "train@Boxing-0" in stages(fresh) and "train@Pong-0" not in stages(fresh)
    assert damaged.read_bytes() == bytes(content)


def test_a_run_that_was_trained_again_is_recorded_again(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    """The same fingerprint, other bytes: as from another kind of device."""
    folder = project.folder("Pong")
    (record_file,) = folder.glob("run-*.json")
    document = json.loads(record_file.read_text(encoding="utf-8"))
    for name in ("checkpoint.parquet", "training.parquet"):
        shutil.copy(folder / name, folder / "new")
        (folder / "new").chmod(0o644)
        with (folder / "new").open("ab") as file:
            file.write(b"another")
        (folder / "new").replace(folder / name)
        item = next(item for item in document["artifacts"] if item["path"] == name)
        item |= {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    record_file.write_text(json.dumps(document), encoding="utf-8")
    done = record_in(project)
    assert "train@Pong-0" in done.recorded and "train@Boxing-0" not in done.recorded
    assert status(project) == set()


def test_a_blob_damaged_after_it_was_recorded_is_named(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    before = project.lock()
    (project.root / CHECKPOINT).unlink()
    (project.root / CHECKPOINT).write_bytes(b"not a checkpoint")
    done = record_in(project)
    assert done.recorded == [] and project.lock() == before
    assert len(done.problems) == 1 and str(CHECKPOINT) in done.problems[0]
    project.assert_cache_is_sound()


def test_it_waits_for_other_dvc_processes(fresh: Clone) -> None:
    path = fresh.root / ".dvc/tmp/lock"
    path.parent.mkdir()
    lock = Lock(str(path))
    with lock:  # for longer than DVC's commands wait
        process = fresh.start("drama", "record")
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=8)
        assert "not noted in DVC" in fresh.run("drama", "plan")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert len(stages(fresh)) == STAGES


@pytest.mark.parametrize("missing", [".dvc", ".git"])
def test_without_dvc_there_is_nothing_to_record(fresh: Clone, missing: str) -> None:
    path = fresh.root / missing
    path.rename(path.with_name("away"))
    output = fresh.run("drama", "record")
    assert len(output.splitlines()) == 1 and "nothing recorded" in output


def test_other_results_are_left_alone(fresh: Clone) -> None:
    assert "results/other: not found" in fresh.run("drama", "record", "results/other", expected=2)
    (fresh.root / "results/other").mkdir()
    output = fresh.run("drama", "record", "results/other")
    assert len(output.splitlines()) == 1
    assert "results/other" in output and "results/tiny" in output
    assert not (fresh.root / "dvc.lock").exists()


def test_results_on_another_disk_are_kept_through_a_link(project: Clone) -> None:
    disk = project.root.parent / "scratch"
    disk.mkdir()
    (project.root / "results/tiny").rename(disk / "tiny")
    project.replace("config/config.yaml", "results: results", f"results: {disk}")
    advice = f"ln -s {disk}/tiny results/tiny"
    assert advice in project.run("drama", "stages", expected=2)
    assert advice in project.run("drama", "record")
    assert CLEAN not in project.run("dvc", "status")
    project.replace("config/config.yaml", f"results: {disk}", "results: results")
    (project.root / "results/tiny").symlink_to(disk / "tiny")
    (project.root / "dvc.lock").write_text("")
    project.run("drama", "record")
    assert CLEAN in project.run("dvc", "status")
    shutil.rmtree(project.folder("Pong") / "replay")
    project.run("dvc", "pull", "train@Pong-0")
    assert project.present("Pong") == project.blobs("Pong")
    project.run("drama", "verify", "--files-only", "results/tiny")
    assert NOTHING in project.run(*SNAKEMAKE, "-n")


def test_a_run_that_is_not_trained_has_no_stage_and_fails_no_pull(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    project.replace("config/config.yaml", "Boxing: {}", "Boxing: {}\n  Krull: {}")
    project.run("drama", "plan")
    done = record_in(project)
    assert (done.unfinished, done.problems) == (1, [])
    assert "Krull" not in (project.root / "dvc.yaml").read_text(encoding="utf-8")
    shutil.rmtree(project.root / ".dvc/cache")
    (project.root / CHECKPOINT).unlink()
    project.run("dvc", "pull")
    assert project.present("Pong") == project.blobs("Pong")
    assert "Krull" not in project.run("dvc", "repro", "--dry", "--allow-missing")


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"<<<<<<< HEAD\nvars: []\n",
        b"stages: []\n",
        b"\xff\xfe",
        b"vars: " + b"[" * 20_000,
    ],
    ids=["removed", "emptied", "in conflict", "without results", "not UTF-8", "deep"],
)
def test_a_damaged_dvc_yaml_is_written_anew(
    project: Clone, record_in: Callable[[Clone], Recorded], content: bytes | None
) -> None:
    path = project.root / "dvc.yaml"
    before = path.read_text(encoding="utf-8")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    done = record_in(project)
    assert path.read_text(encoding="utf-8") == before
    assert done.problems == [] and ["unreadable" in note for note in done.notes] == [True]
    assert CLEAN in project.run("dvc", "status")


def test_another_preset_is_kept_when_asked_for(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    before = project.lock()
    source = project.root / "config/presets"
    shutil.copy(source / "tiny.yaml", source / "other.yaml")
    project.replace("config/config.yaml", "preset: tiny", "preset: other")
    project.run("drama", "plan")
    assert "DVC keeps results/tiny" in project.run("drama", "record")
    assert project.lock() == before
    project.run("drama", "stages")
    done = record_in(project)
    assert any("dropped" in note and "train@Pong-0" in note for note in done.notes)
    assert stages(project) == {}
    project.replace("config/config.yaml", "preset: other", "preset: tiny")
    project.run("drama", "stages")
    record_in(project)
    assert project.lock() == before


def test_what_is_not_asked_for_any_more_is_dropped_and_said_so(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    blobs = project.present("Boxing")
    project.replace("config/config.yaml", "  Boxing: {}\n", "")
    assert "Boxing seed0" in project.run("drama", "plan")
    assert not list((project.root / "results/tiny/recipes/Boxing").glob("*"))
    done = record_in(project)
    (note,) = done.notes
    assert "dropped train@Boxing-0, evaluate@Boxing-0, which" in note and not done.problems
    assert set(stages(project)) == {"plan", "report", "train@Pong-0", "evaluate@Pong-0"}
    assert project.present("Boxing") == blobs
    assert not record_in(project).notes


def test_snakemake_records_when_it_ends_well_and_when_it_does_not(fresh: Clone) -> None:
    (stamp,) = fresh.results("report/report-*.json")
    stamp.unlink()
    fresh.run(*SNAKEMAKE)
    before = stages(fresh)
    assert len(before) == STAGES

    (fresh.root / "dvc.lock").unlink()
    (lost,) = fresh.results("runs/Pong/seed0/evaluation-*.parquet")
    lost.unlink()
    checkpoint = fresh.folder("Pong") / "checkpoint.parquet"
    checkpoint.unlink()
    checkpoint.write_bytes(b"not a checkpoint")
    output = fresh.run(*SNAKEMAKE, expected=1)
    assert "Not everything is recorded" in output and "checkpoint.parquet: damaged" in output
    assert stages(fresh)["train@Boxing-0"] == before["train@Boxing-0"]
    assert "train@Pong-0" not in stages(fresh)


# --- another clone -------------------------------------------------------------------------------


def test_a_fresh_clone_trains_nothing_and_pulls_what_it_wants(
    other: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    assert NOTHING in other.run(*SNAKEMAKE)
    before = other.lock()
    done = record_in(other)
    assert (done.recorded, done.notes, done.problems) == ([], [], [])
    assert other.lock() == before
    assert "Running stage" not in other.run("dvc", "repro", "--dry", "--allow-missing")
    assert not any(other.present(game) for game in GAMES), "something large was downloaded"

    other.run("dvc", "pull", "--quiet", "train@Pong-0")
    assert other.present("Pong") == other.blobs("Pong")
    assert other.present("Boxing") == {}
    assert not (other.folder("Pong") / "checkpoint.parquet").stat().st_mode & 0o222


def test_a_run_that_goes_on_never_writes_into_the_cache(project: Clone) -> None:
    """Its files are read-only links into the cache, which root's permissions do not protect."""
    (project.root / record_of(project, "Pong")).unlink()
    cached = list(project.stored(project.root / ".dvc/cache"))
    written = {path: path.stat().st_mtime_ns for path in cached}
    recipe = "results/tiny/recipes/Pong/seed0.json"
    assert "from step 60 of 60" in project.run("drama", "train", recipe, "--device", "cpu")
    checkpoint = (project.folder("Pong") / "checkpoint.parquet").stat()
    assert checkpoint.st_nlink == 1 and checkpoint.st_mode & 0o200
    assert written == {path: path.stat().st_mtime_ns for path in cached}


# --- what a kill leaves --------------------------------------------------------------------------


def conflict(text: str) -> str:
    """What git leaves when two branches recorded Pong: this clone's entry below the other's."""
    start = text.index("  train@Pong-0:")
    theirs = re.sub(r"md5: \w+", f"md5: {'0' * 32}", text[start:])
    return f"{text[:start]}<<<<<<< HEAD\n{theirs}=======\n{text[start:]}>>>>>>> theirs\n"


STAGE_LINE = re.compile(r"^  [\w@-]+:$", re.MULTILINE)
DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "emptied": (lambda text: "", "empty"),
    "cut": (lambda text: text[: text.index("\n", len(text) * 2 // 3) - 1], "cut off"),
    "cut after a stage": (lambda text: text[: list(STAGE_LINE.finditer(text))[2].start()], ""),
    "garbled": (lambda text: text.replace("outs:", "outs: ]"), "YAML"),
    "of other types": (lambda text: text.replace("    deps:\n", "    deps: 5\n    x:\n", 1), "cut"),
    "of other places": (lambda text: re.sub("md5: .{8}", "md5: ../../..", text, count=1), "cut"),
    "of numbered stages": (lambda text: text.replace("  train@Pong-0:", "  5:"), "cut"),
    "in conflict": (conflict, "conflict"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pulled", [True, False])
def test_a_damaged_dvc_lock_is_repaired(
    request: pytest.FixtureRequest,
    record_in: Callable[[Clone], Recorded],
    damage: str,
    pulled: bool,
) -> None:
    """From the runs' files where they are here, else from what git and the backup hold."""
    clone: Clone = request.getfixturevalue("project" if pulled else "other")
    before = stages(clone)
    harm, word = DAMAGES[damage]
    (clone.root / "dvc.lock").write_text(harm(clone.lock()), encoding="utf-8")
    done = record_in(clone)
    assert stages(clone) == before
    assert done.problems == []
    assert word in " ".join(done.notes) and bool(word) == bool(done.notes)


def test_what_dvc_was_just_linking_is_brought_back(
    fresh: Clone, recorded: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    """DVC's own commit, in `dvc repro`, removes a file and then links it from the cache."""
    checkpoint = fresh.folder("Pong") / "checkpoint.parquet"
    cached = fresh.root / ".dvc/cache/files/md5/aa/its-name-is-not-looked-at"
    cached.parent.mkdir(parents=True)
    checkpoint.rename(cached)
    done = record_in(fresh)
    assert any("checkpoint.parquet: was missing" in note for note in done.notes)
    assert stages(fresh) == stages(recorded)
    assert fresh.present("Pong") == fresh.blobs("Pong")


def test_without_any_earlier_dvc_lock_it_is_made_from_the_runs(
    project: Clone, record_in: Callable[[Clone], Recorded]
) -> None:
    before = stages(project)
    project.git("rm", "--cached", "--quiet", "dvc.lock")
    project.git("commit", "--quiet", "--message=No ledger")
    (project.root / "dvc.lock").write_text("", encoding="utf-8")
    assert set(record_in(project).recorded) == set(before)
    assert stages(project) == before


@pytest.mark.parametrize("content", ["", "{", '{"write": {"PATH": {"pid": 4194305, "cmd": "x"}}}'])
def test_a_list_of_processes_that_a_kill_left_is_no_obstacle(
    fresh: Clone, record_in: Callable[[Clone], Recorded], content: str
) -> None:
    path = fresh.root / ".dvc/tmp/rwlock"
    path.parent.mkdir(exist_ok=True)
    text = content.replace("PATH", str(fresh.folder("Pong") / "checkpoint.parquet"))
    path.write_text(text, encoding="utf-8")
    done = record_in(fresh)
    assert len(done.recorded) == STAGES and done.problems == []
    assert bool(done.notes) == (content in ("", "{"))


@pytest.mark.parametrize(
    ("place", "when", "count"),
    [
        ("commit", "before", 2),
        ("cache", "after", 2),
        ("link", "before", 2),  # DVC has removed the file
        ("link", "after", 3),
        ("write", "before", 1),
        ("replace", "before", 1),
        ("write", "after", 1),
    ],
)
def test_killed_at_any_moment_it_loses_nothing(
    fresh: Clone, recorded: Clone, place: str, when: str, count: int
) -> None:
    fresh.run("python", "-c", KILLED, place, when, str(count), expected=-9)
    fresh.run("drama", "record")
    assert stages(fresh) == stages(recorded)
    for game in GAMES:
        assert fresh.present(game) == fresh.blobs(game)
    fresh.assert_cache_is_sound()
    assert records(fresh) == records(recorded)
