"""The pipeline in its container: the same bytes as without one, today's code, named in records."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from adapted import lend_image
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from test_pipeline import GAMES, SNAKEMAKE, Project, copy_sources

from drama.pipeline.artifacts.image import note_of

IN_CONTAINERS = (*SNAKEMAKE, "--software-deployment-method", "apptainer", "--apptainer-args=--nv")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which nothing has run; a repository, so that records name a commit."""
    project = copy_sources(tmp_path_factory.mktemp("untouched"))
    names = [path.name for path in project.root.iterdir()]
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    project.run("git", "init", "--quiet")
    project.run("git", "add", *names)
    project.run("git", *author, "commit", "--quiet", "--message=All of it")
    return project


@pytest.fixture(scope="module")
def plain(untouched: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project, run without a container."""
    project = Project(tmp_path_factory.mktemp("plain") / "project")
    shutil.copytree(untouched.root, project.root)
    project.run(*SNAKEMAKE)
    return project


@pytest.fixture(scope="module")
def contained(untouched: Project, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project, run in the container."""
    project = Project(tmp_path_factory.mktemp("contained") / "project")
    shutil.copytree(untouched.root, project.root)
    lend_image(project.root, image)
    project.run(*IN_CONTAINERS)
    return project


@pytest.fixture
def project(contained: Project, tmp_path: Path) -> Project:
    shutil.copytree(
        contained.root, tmp_path / "project", ignore=shutil.ignore_patterns("*.sif", "images")
    )
    copy = Project(tmp_path / "project")
    (image,) = (contained.root / "containers/images").glob("*.sif")
    lend_image(copy.root, image)
    return copy


def record(project: Project, game: str) -> dict:
    (path,) = project.results(f"runs/{game}/seed0/run-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def inside(image: Path, folder: Path, *command: str, **environment: str) -> str:
    """Run a command in the image and return what it printed, errors included."""
    done = subprocess.run(
        ["apptainer", "--quiet", "exec", "--home", folder, image, *command],
        cwd=folder,
        env=Project(folder).environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def test_a_container_gives_the_same_bytes(plain: Project, contained: Project) -> None:
    for game in GAMES:
        assert contained.artifacts(game) == plain.artifacts(game)
        evaluation = f"runs/{game}/seed0/evaluation-*.parquet"
        (score,), (expected,) = contained.results(evaluation), plain.results(evaluation)
        assert score.read_bytes() == expected.read_bytes()


def test_records_name_the_image_and_the_commit(
    plain: Project, contained: Project, image: Path
) -> None:
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    for game in GAMES:
        assert record(contained, game)["image"] == digest
        assert record(plain, game)["image"] is None
        commit = record(plain, game)["git_commit"]
        assert commit is not None and record(contained, game)["git_commit"] == commit


def test_the_container_leaves_nothing_of_its_own(plain: Project, contained: Project) -> None:
    assert {path.name for path in contained.root.iterdir()} == {
        path.name for path in plain.root.iterdir()
    }


def test_changed_code_runs_in_the_same_image(project: Project) -> None:
    (lost,) = project.results("runs/Pong/seed0/evaluation-*.parquet")
    before = lost.read_bytes()
    lost.unlink()
    project.append("drama/pipeline/jobs.py", '\nsay("these are new words")\n')
    project.run(*IN_CONTAINERS)
    (log,) = project.results("logs/Pong/seed0/evaluate-*.log")
    assert "these are new words" in log.read_text(encoding="utf-8")
    assert lost.read_bytes() == before


def test_results_on_another_disk_are_seen_inside(project: Project) -> None:
    """Through a link, in a place that Apptainer does not show by itself."""
    with TemporaryDirectory(dir="/srv") as disk:
        place = project.root / "results/tiny"
        shutil.copytree(place, f"{disk}/tiny", symlinks=True)
        shutil.rmtree(place)
        place.symlink_to(f"{disk}/tiny")
        (lost,) = project.results("runs/Pong/seed0/evaluation-*.parquet")
        before = lost.read_bytes()
        lost.unlink()
        project.run(*IN_CONTAINERS)
        assert lost.read_bytes() == before


def test_a_changed_lock_file_refuses_the_image(project: Project, image: Path) -> None:
    project.replace("containers/run.lock", "numpy==2", "numpy==1")
    message = project.run(*IN_CONTAINERS, expected=2)
    assert f"{image.name} was built for other versions" in message
    assert "make container VARIANT=cpu" in message and "Traceback" not in message
    assert project.run(*SNAKEMAKE, "-n")  # without the container, the lock is the user's affair


def test_nothing_of_the_user_reaches_python_inside(image: Path, tmp_path: Path) -> None:
    (tmp_path / "drama").mkdir()
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('from outside')\n")
    site = tmp_path / ".local/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    code = "import sys; print(sys.path, sys.prefix)"
    printed = inside(image, tmp_path, "python", "-c", code, PYTHONPATH=str(tmp_path))
    assert str(tmp_path) not in printed and "/opt/drama/venv" in printed


def test_the_image_keeps_nothing_of_how_the_building_machine_reaches_packages(
    image: Path, tmp_path: Path
) -> None:
    pip = ("env", "--ignore-environment", "/opt/drama/venv/bin/pip")
    assert inside(image, tmp_path, *pip, "config", "list") == ""
    assert inside(image, tmp_path, "ls", "-A", "/mnt") == ""


def test_what_is_installed_inside_is_what_the_locks_pin(image: Path, tmp_path: Path) -> None:
    from test_house import pins

    listed = json.loads(inside(image, tmp_path, "pip", "list", "--format=json"))
    versions = {item["name"].lower().replace("_", "-"): item["version"] for item in listed}
    for name, version in pins("run").items():
        assert versions[name].split("+")[0] == version, name
    assert not set(versions) & set(pins("report")), "a new plotting library asks for no new image"


def test_the_list_beside_the_image_is_what_is_in_it(image: Path, tmp_path: Path) -> None:
    note = json.loads(note_of(image).read_text(encoding="utf-8"))
    text = image.with_name(note["sbom"]).read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert found["metadata"]["component"]["hashes"][0]["content"] == note["sha256"]
    assert found["metadata"]["timestamp"] == note["built"]
    purls = [PackageURL.from_string(part["purl"]) for part in found["components"] if "purl" in part]
    listed = json.loads(inside(image, tmp_path, "pip", "list", "--format=json"))
    python = {(purl.name, purl.version) for purl in purls if purl.type == "pypi"}
    assert python == {(item["name"].lower().replace("_", "-"), item["version"]) for item in listed}
    query = ("dpkg-query", "--show", "--showformat=${Package} ${Version}\n")
    debian = {f"{purl.name} {purl.version}" for purl in purls if purl.type == "deb"}
    assert debian == set(inside(image, tmp_path, *query).splitlines())


def test_drama_outside_the_project_says_so(image: Path, tmp_path: Path) -> None:
    assert "there is no drama/ in this folder" in inside(image, tmp_path, "drama", "--help")
