"""Lock files: what `make lock` writes into which, and what `make setup` installs of them.

The index is a folder of this machine, the packages are toys under real names.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CONTAINERS = Path(__file__).resolve().parents[1] / "containers"


def wheel(folder: Path, name: str, version: str, *needs: str, module: str = "") -> Path:
    """Write a wheel that pip and uv install."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    fields = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", f"Version: {version}"]
    files = {
        module or f"{name}.py": "",
        f"{info}/METADATA": "\n".join([*fields, *(f"Requires-Dist: {need}" for need in needs), ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_in_index(index: Path, *wheels: Path) -> None:
    """Add wheels with their hashes to the pages of a folder index."""
    for path in wheels:
        page = index / path.name.split("-")[0].replace("_", "-") / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a", encoding="utf-8") as file:
            file.write(f'<a href="{path.as_uri()}#sha256={sha256(path)}">{path.name}</a>\n')


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment's folder of commands, uv among them."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    uv = Path(sys.prefix) / "bin" / "uv"
    assert uv.exists(), "uv is not installed beside this Python: make setup"
    (folder / "bin" / "uv").symlink_to(uv)
    return folder / "bin"


class Machine:
    """A machine with an index in a folder, the lock files' scripts, and no network."""

    def __init__(self, root: Path, commands: Path) -> None:
        self.root, self.commands = root, commands
        self.tools = root / "tools"
        self.tools.mkdir()
        for name in ("install.sh", "lock.sh", "uv.sh", "installer.lock"):
            (root / name).write_bytes((CONTAINERS / name).read_bytes())

    def offer(self, name: str, version: str, *needs: str, module: str = "") -> Path:
        """Put a wheel into the index."""
        path = wheel(self.root / "files", name, version, *needs, module=module)
        list_in_index(self.root / "simple", path)
        return path

    def lock(self, name: str, pin: str, *wheels: Path) -> None:
        hashes = [f"--hash=sha256:{sha256(path)}" for path in wheels]
        text = " \\\n    ".join([pin, *hashes]) + "\n"
        (self.root / f"{name}.lock").write_text(f"# A lock.\n{text}", encoding="utf-8")

    def run(self, script: str, *arguments: object, **settings: str) -> tuple[int, str]:
        """Run a script with nothing of this machine's settings of pip and uv but the given ones."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PIP_", "UV_")) and key != "TORCH"
        }
        nowhere = "http://127.0.0.1:1"
        ours = {
            "PATH": f"{self.tools}:{kept['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": (self.root / "simple").as_uri(),
            "UV_CACHE_DIR": str(self.root / "cache"),
            "HTTPS_PROXY": nowhere,
            "ALL_PROXY": nowhere,
        }
        done = subprocess.run(
            ["sh", self.root / script, self.commands, *map(str, arguments)],
            env=kept | ours | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


# --- installing ----------------------------------------------------------------------------------


class Installing(Machine):
    """Its index has torch's CUDA build, and a folder that pip looks at has the CPU build."""

    def __init__(self, root: Path, commands: Path) -> None:
        super().__init__(root, commands)
        self.links = root / "wheels"
        cuda = self.offer("torch", "2.13.0", module="torch/cuda.py")
        cpu = wheel(self.links, "torch", "2.13.0+cpu", module="torch/cpu.py")
        self.lock("run", "torch==2.13.0", cuda)
        self.lock("cpu", "torch==2.13.0+cpu", cpu)
        self.lock("cuda", "nvidia-toy==13.0", self.offer("nvidia_toy", "13.0"))

    def install(self, **settings: str) -> tuple[int, str]:
        lock = self.root / "run.lock"
        return self.run("install.sh", lock, **({"PIP_FIND_LINKS": str(self.links)} | settings))

    def installed(self) -> set[str]:
        (site,) = self.commands.parent.glob("lib/*/site-packages")
        names = {path.stem.replace("_", "-") for path in site.glob("*.dist-info")}
        return {name for name in names if not name.startswith(("pip-", "setuptools-"))}


CPU, CUDA = {"torch-2.13.0+cpu"}, {"torch-2.13.0", "nvidia-toy-13.0"}


@pytest.fixture
def machine(tmp_path: Path, commands: Path) -> Installing:
    uninstall = [commands / "uv", "pip", "uninstall", "--quiet", "--python", commands / "python"]
    subprocess.run([*uninstall, "torch", "nvidia-toy"], check=True)
    return Installing(tmp_path, commands)


def test_without_a_gpu_the_cpu_build_that_pip_finds_in_a_folder_is_installed(
    machine: Installing,
) -> None:
    for _ in range(2):
        code, output = machine.install()
        assert code == 0, output
        assert "torch for cpu" in output
        assert machine.installed() == CPU


def test_with_a_gpu_the_cuda_build_and_its_libraries_are(machine: Installing) -> None:
    driver = machine.tools / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho GPU 0: a toy\n", encoding="utf-8")
    driver.chmod(0o755)
    code, output = machine.install()
    assert code == 0, output
    assert machine.installed() == CUDA


def test_the_build_of_torch_can_be_chosen_and_chosen_anew(machine: Installing) -> None:
    for build, expected in (("cpu", CPU), ("cuda", CUDA), ("cpu", CPU)):
        code, output = machine.install(TORCH=build)
        assert code == 0, output
        assert machine.installed() == expected
    code, output = machine.install(TORCH="gpu")
    assert code == 2 and "TORCH is 'gpu'; it has to be cpu or cuda" in output


def test_where_no_cpu_build_can_be_reached_the_cuda_build_is_installed(machine: Installing) -> None:
    code, output = machine.install(PIP_FIND_LINKS="", TORCH="cpu")
    assert code == 1 and "TORCH=cuda runs without a GPU too" in output
    assert machine.installed() == set()
    code, output = machine.install(PIP_FIND_LINKS="")
    assert code == 0 and "its CUDA build runs without a GPU too" in output
    assert machine.installed() == CUDA


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_a_file_of_other_bytes_is_refused(machine: Installing, build: str) -> None:
    machine.lock("run", "torch==2.13.0", wheel(machine.root / "other", "torch", "2.13.0"))
    machine.lock("cpu", "torch==2.13.0+cpu", wheel(machine.root / "other", "torch", "2.13.0+cpu"))
    code, output = machine.install(TORCH=build)
    assert code != 0 and "mismatch" in output.lower(), output
    assert machine.installed() == set()


# --- locking -------------------------------------------------------------------------------------


class Locking(Machine):
    """Its index has toys of what the requirement files ask for."""

    def __init__(self, root: Path, commands: Path) -> None:
        super().__init__(root, commands)
        self.offer("nvidia_toy", "13.0")
        self.torch = self.offer("torch", "2.13.0", "nvidia-toy; sys_platform == 'linux'", "shared")
        self.lock("cpu", "torch==2.13.0+cpu", self.torch)
        self.offer("rich", "15.0", "colorama; sys_platform == 'win32'")
        self.offer("plots", "1.0", "shared<2")
        self.offer("flow", "1.0", "colorama", "appnope; sys_platform == 'darwin'")
        self.offer("mamba", "1.0", "tilelang", "colorama", "nvidia-toy")
        for name in ("shared", "colorama", "appnope", "tests", "uv"):
            self.offer(name, "1.0")
        self.offer("shared", "2.0")
        for name, lines in {"run": "torch==2.13.0\nrich", "report": "plots", "workflow": "flow",
                            "dev": "tests\nflow", "kernels": "mamba\nplots"}.items():  # fmt: skip
            (root / f"{name}.in").write_text(f"# What is needed.\n{lines}\n", encoding="utf-8")

    def locked(self, name: str) -> set[str]:
        text = (self.root / f"{name}.lock").read_text(encoding="utf-8")
        assert str(self.root) not in text and "index" not in text
        return set(re.findall(r"^\w.*(?= \\$)", text, re.MULTILINE))

    def write_locks(self) -> None:
        """Lock where pip would take another build of torch, from a folder."""
        wheel(self.root / "wheels", "torch", "2.13.0+cpu")
        code, output = self.run("lock.sh", PIP_FIND_LINKS=str(self.root / "wheels"))
        assert code == 0, output


def test_a_package_stands_in_the_first_lock_whose_requirements_need_it(
    tmp_path: Path, commands: Path
) -> None:
    machine = Locking(tmp_path, commands)
    machine.write_locks()
    expected = {
        # One version for all locks, so the one that suits what only the report needs.
        "run": {"torch==2.13.0", "rich==15.0", "shared==1.0"},
        "cuda": {"nvidia-toy==13.0"},
        "report": {"plots==1.0"},
        "workflow": {"flow==1.0", "colorama==1.0", "appnope==1.0 ; sys_platform == 'darwin'"},
        "dev": {"tests==1.0"},
        # The image, which is not to change with the report, has no report.lock.
        "kernels": {"mamba==1.0", "plots==1.0", "colorama==1.0"},
    }
    assert {name: machine.locked(name) for name in expected} == expected
    assert f"--hash=sha256:{sha256(machine.torch)}\n" in (tmp_path / "run.lock").read_text()


def test_what_is_locked_stays_until_its_entry_is_deleted(tmp_path: Path, commands: Path) -> None:
    machine = Locking(tmp_path, commands)
    machine.write_locks()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.lock")}
    machine.offer("rich", "16.0")
    machine.write_locks()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.lock")} == before
    lock = tmp_path / "run.lock"
    lock.write_text(re.sub(r"rich==.*\n.*\n", "", lock.read_text()))
    machine.write_locks()
    assert machine.locked("run") == {"torch==2.13.0", "rich==16.0", "shared==1.0"}
