"""Crates: what is in them, what they say, that the formats' own checkers and readers agree.

The checkers run without a network. What they would fetch, two JSON-LD contexts, lies in a cache:
RO-Crate's as the library brings it, with the one name that version 1.1 spells otherwise, and the
few terms of the profile that crates use.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from requests.adapters import BaseAdapter
from requests_cache import CachedSession
from test_pipeline import GAMES, Project
from urllib3 import HTTPResponse

from drama.agent.evaluation import SCHEMA
from drama.errors import ConfigurationError, DramaError
from drama.pipeline.artifacts.crate.citation import read_citation
from drama.pipeline.artifacts.crate.croissant import BOOLEAN, FLOAT, INTEGER, KINDS, TEXT
from drama.pipeline.artifacts.crate.folders import replacing_folder
from drama.pipeline.artifacts.crate.writing import write_crate
from drama.runs.columns import COLUMN_TYPES
from drama.runs.metrics import EPISODE_SCHEMA, TRAINING_SCHEMA

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("pipeline")]

ROOT = Path(__file__).resolve().parents[2]
WFRUN = "https://w3id.org/ro/terms/workflow-run"
TERMS = ("ContainerImage", "SIFImage", "containerImage", "environment", "resourceUsage", "sha256")
RESULTS = "results/tiny"


# --- made once -----------------------------------------------------------------------------------


def copy_of(finished: Project, root: Path) -> Project:
    shutil.copytree(finished.root, root, symlinks=True, ignore=shutil.ignore_patterns(".snakemake"))
    for name in ("CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    return Project(root)


@pytest.fixture(scope="module")
def crated(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished project with two crates of it, `small` and `large`; leave it as it is."""
    project = copy_of(finished, tmp_path_factory.mktemp("crated") / "project")
    project.run("drama", "crate", RESULTS, "--to", "small")
    project.run("drama", "crate", RESULTS, "--to", "large", "--with-large")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    return copy_of(finished, tmp_path / "project")


@pytest.fixture
def write(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a crate of the project into a folder, in this process; returns what is said."""
    monkeypatch.chdir(project.root)

    def to(folder: str, *, with_large: bool = False) -> str:
        return "\n".join(write_crate(Path(RESULTS), Path(folder), with_large=with_large).lines())

    return to


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[int, str]]:
    """Run RO-Crate's validator on a crate; returns its exit code and what it printed."""
    cache = tmp_path_factory.mktemp("contexts") / "http"
    context = json.loads(resources.files("rocrate").joinpath("data/ro-crate.jsonld").read_bytes())
    context["@context"]["ComputationalWorkflow"] = "https://bioschemas.org/ComputationalWorkflow"
    documents = {
        "https://w3id.org/ro/crate/1.1/context": context,
        f"{WFRUN}/context": {"@context": {term: f"{WFRUN}#{term}" for term in TERMS}},
    }

    class Stored(BaseAdapter):
        def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
            assert request.url
            response = requests.Response()
            response.status_code, response.url, response.request = 200, request.url, request
            response.headers["Content-Type"] = "application/ld+json"
            body = io.BytesIO(json.dumps(documents[request.url]).encode())
            response.raw = HTTPResponse(body, response.headers, 200, preload_content=False)
            return response

        def close(self) -> None:
            pass

    with CachedSession(str(cache), backend="sqlite", expire_after=-1) as session:
        session.mount("https://", Stored())
        for url in documents:
            session.get(url)

    def validate(crate: Path) -> tuple[int, str]:
        command = ["rocrate-validator", "-y", "--disable-color", "validate", str(crate),
                   "--offline", "--cache-path", str(cache), "--profile-identifier",
                   "provenance-run-crate", "--requirement-severity", "required",
                   "--verbose", "--no-paging"]  # fmt: skip
        done = subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout

    return validate


def entities(crate: Path) -> dict[str, dict[str, Any]]:
    graph = json.loads((crate / "ro-crate-metadata.json").read_bytes())["@graph"]
    known = {entity["@id"]: entity for entity in graph}
    assert len(known) == len(graph)
    return known


def named(value: Any) -> list[str]:
    """The entities that a property names."""
    return [item["@id"] for item in (value if isinstance(value, list) else [value])]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def record(project: Project, game: str) -> tuple[Path, dict[str, Any]]:
    (path,) = project.results(f"runs/{game}/seed0/run-*.json")
    return path, json.loads(path.read_bytes())


# --- what is in a crate --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "large"])
def test_the_checker_finds_a_provenance_run_crate(
    crated: Project, check: Callable[[Path], tuple[int, str]], name: str
) -> None:
    code, output = check(crated.root / name)
    assert code == 0 and "is a valid provenance-run-crate" in output, output


def test_the_checker_would_find_mistakes(
    crated: Project, check: Callable[[Path], tuple[int, str]], tmp_path: Path
) -> None:
    crate = tmp_path / "crate"
    shutil.copytree(crated.root / "small", crate)
    metadata = crate / "ro-crate-metadata.json"
    document = json.loads(metadata.read_bytes())
    (workflow,) = (entity for entity in document["@graph"] if entity["@id"] == "Snakefile")
    del workflow["hasPart"]
    metadata.write_text(json.dumps(document), encoding="utf-8")
    (crate / "croissant.json").unlink()
    code, output = check(crate)
    assert code == 1
    assert "MUST refer to orchestrated tools" in " ".join(output.split())
    assert "croissant.json" in output


@pytest.mark.parametrize("name", ["small", "large"])
def test_every_file_is_named_with_its_size_and_checksum(crated: Project, name: str) -> None:
    known, held = entities(crated.root / name), files(crated.root / name)
    del held["ro-crate-metadata.json"]
    listed = {key for key, entity in known.items() if "File" in entity["@type"]}
    assert {key for key in listed if not key.startswith("#")} == set(held)
    for path, content in held.items():
        assert known[path]["contentSize"] == str(len(content))
        assert known[path]["sha256"] == hashlib.sha256(content).hexdigest()
        assert known[path]["name"] == path
    absent = {key.removeprefix("#"): known[key] for key in listed if key.startswith("#")}
    large = {
        f"runs/{game}/seed0/{item['path']}": (item["sha256"], str(item["bytes"]))
        for game in GAMES
        for item in record(crated, game)[1]["artifacts"]
        if item["path"].startswith(("checkpoint", "replay/"))
    }
    assert len(large) == 2 * len(GAMES)
    if name == "large":
        assert not absent and set(large) <= set(held)
    else:
        said = {key: (it["sha256"], it["contentSize"]) for key, it in absent.items()}
        assert said == large and not set(large) & set(held)


def test_files_are_those_of_the_results(crated: Project) -> None:
    held = files(crated.root / "small")
    for place in ("runs", "report", "recipes"):
        ours = files(crated.root / RESULTS / place)
        kept = {name for name in ours if "checkpoint" not in name and "replay/" not in name}
        kept -= {name for name in kept if name.endswith("status.json") or ".lock" in name}
        assert kept == {n.removeprefix(f"{place}/") for n in held if n.startswith(f"{place}/")}
        assert all(held[f"{place}/{name}"] == ours[name] for name in kept)
    for name in ("Snakefile", "workflow/rules/train.smk", "LICENSE", "CITATION.cff"):
        assert held[name] == (ROOT / name).read_bytes()


@pytest.mark.parametrize("game", GAMES)
def test_a_run_is_told_from_its_record(crated: Project, game: str) -> None:
    known, (path, made) = entities(crated.root / "large"), record(crated, game)
    action = known[f"#train-{game}-0"]
    (recipe,) = named(action["object"])
    assert known[recipe]["sha256"] == made["fingerprint"]
    place = f"runs/{game}/seed0"
    left = {f"{place}/{item['path']}" for item in made["artifacts"]} | {f"{place}/{path.name}"}
    assert set(named(action["result"])) == left
    assert action["endTime"] == made["finished"]
    values = {known[key]["name"]: known[key]["value"] for key in named(action["environment"])}
    assert values == {"device": "cpu", "backend": made["backend"]} | made["versions"]
    (seconds,) = named(action["resourceUsage"])
    assert float(known[seconds]["value"]) == made["wall_seconds"]
    (tool,) = named(action["instrument"])
    assert (made["git_commit"] or "unknown")[:12] in known[tool]["softwareVersion"]
    assert "160 agent steps" in action["description"]

    (scored,) = (known[key] for key in known if key.startswith(f"#evaluate-{game}-0-"))
    (evaluation,) = named(scored["result"])
    note = json.loads((crated.root / RESULTS / place / "evaluation.json").read_bytes())
    assert evaluation == f"{place}/{note['path']}" and known[evaluation]["sha256"] == note["sha256"]
    assert f"mean return {note['mean_return']:g} over 2 greedy" in scored["description"]
    assert {f"{place}/checkpoint.parquet", f"recipes/{game}/seed0.evaluation.json"} < {
        *named(scored["object"])
    }


def test_the_whole_says_what_it_is(crated: Project) -> None:
    known = entities(crated.root / "small")
    root = known["./"]
    assert root["name"] == "Drama, preset tiny: 2 runs"
    assert "no reproduction" in root["description"] and "missing" not in root["description"]
    assert root["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
    assert root["datePublished"] == max(record(crated, game)[1]["finished"] for game in GAMES)
    assert known[root["author"]["@id"]]["@type"] == "Organization"
    authors = named(known[root["citation"]["@id"]]["author"])
    assert [known[key]["name"] for key in authors[:2]] == ["Wenlong Wang", "Ivana Dusparic"]
    assert root["mainEntity"] == {"@id": "Snakefile"}
    actions = {key for key, it in known.items() if it["@type"] == "CreateAction"}
    assert set(named(root["mentions"])) == actions and len(actions) == 2 * len(GAMES) + 2
    assert root["description"].split(".")[0] in " ".join(
        (crated.root / "small/README.md").read_text(encoding="utf-8").split()
    )


def test_an_image_is_named_by_its_digest(project: Project, write: Callable[..., str]) -> None:
    path, made = record(project, "Pong")
    path.write_text(json.dumps(made | {"image": "5" * 64}), encoding="utf-8")
    write("crate")
    known = entities(project.root / "crate")
    (image,) = named(known["#train-Pong-0"]["containerImage"])
    assert known[image]["sha256"] == "5" * 64 and "SIFImage" in str(known[image])
    assert "containerImage" not in known["#train-Boxing-0"]


def test_the_same_results_give_the_same_bytes(
    crated: Project, project: Project, write: Callable[..., str]
) -> None:
    (project.root / "small").mkdir()  # an empty folder is no hindrance
    for _ in range(2):  # the second replaces the first
        write("small")
        assert files(project.root / "small") == files(crated.root / "small")
    assert not list(project.root.glob(".small*"))


def test_a_crate_is_read_like_results(crated: Project) -> None:
    assert "2 runs: 2 done" in crated.run("drama", "status", "large")
    assert "2 of 2 runs hold" in crated.run("drama", "verify", "large", "--files-only")


# --- campaigns that are not whole ----------------------------------------------------------------


def test_missing_runs_and_those_of_earlier_code_are_said(
    project: Project, check: Callable[[Path], tuple[int, str]]
) -> None:
    made = record(project, "Pong")[1]["fingerprint"]
    for path in project.results("runs/Boxing/seed0/evaluation*"):
        path.unlink()
    project.append("drama/agent/model/world_model.py", "\nAN_ADDITION = 1\n")
    project.run("drama", "plan", "--config", "config/quick.yaml", "--seeds", "0,1")
    output = project.run("drama", "crate", RESULTS)
    summary = "2 of 4 runs, 1 of them not scored, 2 of them by earlier code"
    assert f"crates/tiny: {summary}" in output
    assert f"No report of this plan is in it; `drama report {RESULTS}` writes one" in output
    crate = project.root / "crates/tiny"
    known = entities(crate)
    description = known["./"]["description"]
    assert summary in description and "not trained: Boxing seed 1, Pong seed 1." in description
    assert summary in (crate / "README.md").read_text(encoding="utf-8")
    assert summary in json.loads((crate / "croissant.json").read_bytes())["description"]
    action = known["#train-Pong-0"]
    assert "by earlier code" in action["name"]
    assert known[action["object"]["@id"]]["sha256"] == made
    assert "recipes/Pong/seed1.json" in known and not (crate / "report").exists()
    code, checked = check(crate)
    assert code == 0, checked


def test_a_partial_report_says_what_it_shows(project: Project) -> None:
    project.run("drama", "plan", "--config", "config/quick.yaml", "--seeds", "0,1")
    project.run("drama", "report", RESULTS)
    output = project.run("drama", "crate", RESULTS, "--to", "crate")
    assert "The report in it shows 2 of 4 runs" in output
    assert "2 of 4 runs" in entities(project.root / "crate")["#report"]["description"]
    assert (project.root / "crate/report/index.html").is_file()


def test_without_a_trained_run_there_is_no_crate(project: Project) -> None:
    shutil.rmtree(project.root / RESULTS / "runs")
    output = project.run("drama", "crate", RESULTS, "--to", "crate", expected=2)
    assert "2 runs planned and none of them trained yet" in output
    assert not (project.root / "crate").exists()


# --- what could be lost --------------------------------------------------------------------------


def test_nothing_of_others_is_overwritten(project: Project, write: Callable[..., str]) -> None:
    crate = project.root / "crate"
    crate.mkdir()
    (crate / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"crate: holds notes\.txt"):
        write("crate")
    (crate / "ro-crate-metadata.json").write_text('{"@graph": []}', encoding="utf-8")
    with pytest.raises(ConfigurationError, match="holds ro-crate-metadata"):
        write("crate")
    assert len(files(crate)) == 2
    shutil.rmtree(crate)
    write("crate")
    (crate / "runs/notes.txt").write_text("mine", encoding="utf-8")
    before = files(crate)
    with pytest.raises(ConfigurationError, match=r"crate: holds runs/notes\.txt"):
        write("crate")
    assert files(crate) == before
    with pytest.raises(ConfigurationError, match="Snakefile: a file"):
        write("Snakefile")
    with pytest.raises(ConfigurationError, match="in the results themselves"):
        write(f"{RESULTS}/crate")


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("runs/Pong/seed0/episodes.parquet", "not the bytes that run-"),
        ("runs/Pong/seed0/checkpoint.parquet", "not the bytes that run-"),
        ("runs/Pong/seed0/evaluation-*.parquet", "not a whole evaluation"),
        ("runs/Pong/seed0/run-*.json", "cannot be read"),
        ("report/scores.csv", "not as written"),
    ],
)
def test_damaged_files_go_into_no_crate(
    project: Project, write: Callable[..., str], damaged: str, said: str
) -> None:
    write("crate")
    before = files(project.root / "crate")
    (path,) = project.results(damaged)
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(DramaError) as error:
        write("crate", with_large=True)
    assert said in str(error.value) and path.name in str(error.value)
    assert files(project.root / "crate") == before and not list(project.root.glob(".crate*"))


def test_a_small_file_that_is_not_here_is_missed(
    project: Project, write: Callable[..., str]
) -> None:
    (project.root / RESULTS / "runs/Pong/seed0/training.parquet").unlink()
    with pytest.raises(DramaError, match=r"training\.parquet: not here"):
        write("crate")
    assert not (project.root / "crate").exists()


def test_a_large_file_that_is_not_here_is_only_named(
    project: Project, write: Callable[..., str]
) -> None:
    (project.root / RESULTS / "runs/Pong/seed0/checkpoint.parquet").unlink()
    said = write("crate", with_large=True)
    assert "Named and not in it: 1 large file" in said and "not here" in said
    known = entities(project.root / "crate")
    assert "#runs/Pong/seed0/checkpoint.parquet" in known
    assert "runs/Boxing/seed0/checkpoint.parquet" in known


def test_a_folder_comes_back_when_its_successor_fails(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with replacing_folder(folder, lambda _: None) as staging:
            (staging / "file").write_text(content)
    assert (folder / "file").read_text() == "new"
    with pytest.raises(KeyError), replacing_folder(folder, lambda _: None) as staging:
        (staging / "file").write_text("newest")
        raise KeyError
    with pytest.raises(OSError), replacing_folder(folder, lambda _: None) as staging:
        staging.rmdir()
    assert (folder / "file").read_text() == "new" and list(tmp_path.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o755
    # What kills leave: half of a new one, and the old one moved away.
    (tmp_path / ".folder.abcd.part").mkdir()
    folder.rename(tmp_path / ".folder.abcd.old.part")
    with pytest.raises(KeyError), replacing_folder(folder, lambda _: None):
        raise KeyError
    assert (folder / "file").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


def test_without_the_library_it_is_said_what_to_install(project: Project) -> None:
    code = (
        "import sys; sys.modules['rocrate'] = None; from drama.cli import main; "
        f"sys.argv = ['drama', 'crate', '{RESULTS}', '--to', 'crate']; main()"
    )
    output = project.run(sys.executable, "-c", code, expected=1)
    assert "rocrate is not installed here; `pip install" in output
    assert not (project.root / "crate").exists() and not list(project.root.glob(".crate*"))


def test_outside_the_projects_root_it_is_said_where_to_be(crated: Project, tmp_path: Path) -> None:
    elsewhere = Project(tmp_path)
    results = str(crated.root / RESULTS)
    command = ("env", f"PYTHONPATH={crated.root}", "drama", "crate", results)
    assert "Snakefile: not found" in elsewhere.run(*command, expected=2)


def test_a_citation_is_read_before_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (read_citation().license, read_citation().authors) == ("Apache-2.0", ())
    for wrong in ("license: a b", "- a list", "authors: [{name: ''}]", "{", "license: 3"):
        (tmp_path / "CITATION.cff").write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=r"CITATION\.cff"):
            read_citation()


# --- the tables ----------------------------------------------------------------------------------


def test_every_column_is_described_with_its_type() -> None:
    names = {pa.types.is_integer: INTEGER, pa.types.is_floating: FLOAT,
             pa.types.is_boolean: BOOLEAN, pa.types.is_string: TEXT}  # fmt: skip
    replay = pa.schema(
        [(name, pa.string() if name == "frame" else pa.from_numpy_dtype(kind))
         for name, kind in COLUMN_TYPES.items()]
    )  # fmt: skip
    schemas = {"replay": replay, "episodes": EPISODE_SCHEMA, "training": TRAINING_SCHEMA,
               "evaluation": SCHEMA}  # fmt: skip
    assert schemas.keys() == KINDS.keys()
    for kind, schema in schemas.items():
        types = {
            field.name: next(name for test, name in names.items() if test(field.type))
            for field in schema
        }
        assert {name: of for name, (of, _) in KINDS[kind].columns.items()} == types


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib.*")
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_read_through_croissant(crated: Project, kind: str) -> None:
    crate = crated.root / "large"
    dataset = mlcroissant.Dataset(jsonld=crate / "croissant.json")
    assert not dataset.metadata.issues.errors
    rows = list(dataset.records(kind))
    found = 0
    for game in GAMES:
        own = [row for row in rows if row[f"{kind}/run_game"] == game.encode()]
        paths = sorted((crate / f"runs/{game}/seed0").glob(KINDS[kind].files))
        expected = [row for path in paths for row in pq.read_table(path).to_pylist()]
        assert len(own) == len(expected) > 0 or kind == "episodes"
        for row, wanted in zip(own, expected, strict=True):
            assert row[f"{kind}/run_seed"] == 0
            for name, value in wanted.items():
                value = None if value != value else value  # NaN, where there was no update
                value = value.encode() if isinstance(value, str) else value
                assert row[f"{kind}/{name}"] == value, name
        found += len(own)
    assert found == len(rows)
    if kind == "replay":
        size = len(rows[0]["replay/frame"])
        assert size == 64 * 64 * 3 and "64 x 64 pixels" in (crate / "croissant.json").read_text()
        assert np.frombuffer(rows[-1]["replay/frame"], np.uint8).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib.*")
def test_tables_that_are_not_there_are_described_all_the_same(crated: Project) -> None:
    dataset = mlcroissant.Dataset(jsonld=crated.root / "small/croissant.json")
    assert {record_set.name for record_set in dataset.metadata.record_sets} == set(KINDS)
    (replay,) = (it for it in dataset.metadata.distribution if it.id == "replay-files")
    assert "2 files of them are not in this folder" in str(replay.description)
