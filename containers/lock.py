"""Write the lock files beside this script: run it with `make lock`.

pip resolves all requirement files (`*.in`) together, so that the versions agree. Each lock then
holds the dependencies of its own requirement file, less what an earlier lock already pins: a
change of the plotting libraries leaves run.lock, and with it every run's fingerprint, untouched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).resolve().parent
# In order of installation: a package stands in the first lock whose requirements need it.
NAMES = ("run", "report", "workflow", "dev")
# CUDA libraries come with the CUDA build of torch, in the versions it asks for itself. Pinning
# them would force them on machines where pip picks the CPU build.
ACCELERATOR_PREFIXES = ("nvidia-", "cuda-", "triton")


def requirements(name: str) -> list[Requirement]:
    """Read one requirement file, e.g. name "run" for run.in."""
    lines = (FOLDER / f"{name}.in").read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in stripped if line]


def resolve() -> dict[str, dict]:
    """Let pip choose one version of everything: core metadata by canonical package name."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report)]
        for name in NAMES:
            command += ["--requirement", str(FOLDER / f"{name}.in")]
        subprocess.run(command, check=True)
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in installed}


def closure(roots: Iterable[Requirement], resolved: dict[str, dict]) -> set[str]:
    """Names of everything that `roots` need, themselves included, on this platform."""
    seen: set[tuple[str, str]] = set()
    queue = [
        (canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)
    ]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen or name not in resolved:
            continue
        seen.add((name, extra))
        for line in resolved[name].get("requires_dist", []):
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                child = canonicalize_name(needed.name)
                queue += [(child, also) for also in ("", *needed.extras)]
    return {name for name, _ in seen if not name.startswith(ACCELERATOR_PREFIXES)}


def pin(metadata: dict) -> str:
    """One line of a lock, without a local label such as +cpu: the index decides on the build."""
    return f"{canonicalize_name(metadata['name'])}=={Version(metadata['version']).public}"


def main() -> None:
    """Resolve once and write every lock."""
    resolved = resolve()
    pinned: set[str] = set()
    for name in NAMES:
        mine = closure(requirements(name), resolved) - pinned
        pinned |= mine
        header = f"# Written by `make lock` from {name}.in; do not edit.\n"
        lines = [pin(resolved[package]) + "\n" for package in sorted(mine)]
        (FOLDER / f"{name}.lock").write_text(header + "".join(lines), encoding="utf-8")
        print(f"containers/{name}.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
