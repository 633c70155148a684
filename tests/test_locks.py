"""Lock files: read from indexes as pip is configured to see them, and installed hash by hash.

The indexes are folders and a web server of this machine, the packages toys under real names.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONTAINERS = Path(__file__).resolve().parents[1] / "containers"


def wheel(folder: Path, name: str, version: str, *modules: str) -> Path:
    """Write a wheel that pip installs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = dict.fromkeys(modules, "") | {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_in_index(index: Path, package: str, *wheels: Path) -> None:
    """Write the page of a folder index that lists wheels with their hashes."""
    links = [f'<a href="{path.as_uri()}#sha256={sha256(path)}">{path.name}</a>' for path in wheels]
    (index / package).mkdir(parents=True)
    (index / package / "index.html").write_text("\n".join(links), encoding="utf-8")


def pip_environment(**settings: str) -> dict[str, str]:
    """Nothing of this machine's pip settings but the given ones."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | settings


# --- what indexes offer --------------------------------------------------------------------------


def offered(package: str, **settings: str) -> dict[str, str]:
    """Hashes by file name, as lock.py sees them under these pip settings."""
    code = "import indexes, json, sys; print(json.dumps({f.name: f.sha256 for f in indexes.files("
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.argv[1])}}))", package],
        cwd=CONTAINERS,
        env=pip_environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class JsonIndex(BaseHTTPRequestHandler):
    """Answers for one package as today's indexes do."""

    def do_GET(self) -> None:
        found = self.path == "/simple/toy-package/"
        name = "toy_package-1.0.tar.gz"
        listed = {
            "files": [{"filename": name, "url": f"../{name}", "hashes": {"sha256": "cd" * 32}}]
        }
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        self.end_headers()
        self.wfile.write(json.dumps(listed).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web_index() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), JsonIndex)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_files_of_every_place_that_pip_looks_at_are_listed(tmp_path: Path, web_index: str) -> None:
    in_index = wheel(tmp_path / "files", "toy_package", "1.0")
    in_folder = wheel(tmp_path / "wheels", "toy_package", "1.0+cpu")
    wheel(tmp_path / "wheels", "other", "1.0")
    list_in_index(tmp_path / "simple", "toy-package", in_index)
    assert offered(
        "toy-package",
        PIP_INDEX_URL=web_index,
        PIP_EXTRA_INDEX_URL=(tmp_path / "simple").as_uri(),
        PIP_FIND_LINKS=str(tmp_path / "wheels"),
    ) == {
        "toy_package-1.0.tar.gz": "cd" * 32,
        in_index.name: sha256(in_index),
        in_folder.name: sha256(in_folder),
    }


def test_an_index_without_the_package_lists_nothing(tmp_path: Path, web_index: str) -> None:
    assert offered("unknown", PIP_INDEX_URL=web_index) == {}
    assert offered("unknown", PIP_INDEX_URL=tmp_path.as_uri()) == {}


# --- installing ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment's commands."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin"


class Machine:
    """A machine whose index has torch's CUDA build, and one of its folders the CPU build."""

    def __init__(self, root: Path, commands: Path) -> None:
        self.root, self.commands = root, commands
        self.cuda = wheel(root / "files", "torch", "2.13.0", "torch/lib/libtorch_cuda.so")
        self.cpu = wheel(root / "wheels", "torch", "2.13.0+cpu", "torch/lib/libtorch_cpu.so")
        self.library = wheel(root / "files", "nvidia_toy", "13.0")
        list_in_index(root / "simple", "torch", self.cuda)
        list_in_index(root / "simple", "nvidia-toy", self.library)
        (root / "install.sh").write_bytes((CONTAINERS / "install.sh").read_bytes())
        self.lock("run", "torch==2.13.0", self.cuda, self.cpu)
        self.lock("cuda", "nvidia-toy==13.0", self.library)

    def lock(self, name: str, pin: str, *wheels: Path) -> None:
        hashes = [f"--hash=sha256:{sha256(path)}" for path in wheels]
        text = " \\\n    ".join([pin, *hashes]) + "\n"
        (self.root / f"{name}.lock").write_text(f"# A lock.\n{text}", encoding="utf-8")

    def install(self, **settings: str) -> subprocess.CompletedProcess[str]:
        places = {
            "PIP_INDEX_URL": (self.root / "simple").as_uri(),
            "PIP_FIND_LINKS": str(self.root / "wheels"),
        }
        return subprocess.run(
            ["sh", self.root / "install.sh", self.commands / "pip", self.root / "run.lock"],
            env=pip_environment(**places, **settings),
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> set[str]:
        frozen = subprocess.run(
            [self.commands / "pip", "freeze"], capture_output=True, text=True, check=True
        )
        return set(frozen.stdout.split())


@pytest.fixture
def machine(tmp_path: Path, environment: Path) -> Machine:
    made = Machine(tmp_path, environment)
    if made.installed():
        command = [environment / "pip", "uninstall", "--quiet", "--yes", *made.installed()]
        subprocess.run(command, check=True)
    return made


def test_the_build_of_torch_that_a_folder_holds_is_installed(machine: Machine) -> None:
    for _ in range(2):
        done = machine.install()
        assert done.returncode == 0, done.stderr
        assert machine.installed() == {"torch==2.13.0+cpu"}


def test_the_cuda_build_brings_its_libraries(machine: Machine) -> None:
    machine.cpu.unlink()
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == {"torch==2.13.0", "nvidia-toy==13.0"}


def test_the_cuda_build_can_be_asked_for(machine: Machine) -> None:
    done = machine.install(TORCH="cuda")
    assert done.returncode == 0, done.stderr
    assert machine.installed() == {"torch==2.13.0", "nvidia-toy==13.0"}


def test_a_file_of_other_bytes_is_refused(machine: Machine) -> None:
    wheel(machine.root / "wheels", "torch", "2.13.0+cpu", "torch/lib/other.so")
    done = machine.install()
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert machine.installed() == set()
