"""Write the lock files beside this script: run it with `make lock`.

pip resolves all requirement files (`*.in`) together, so that the versions agree. Each lock then
holds the dependencies of its own requirement file, less what an earlier lock already pins: a
change of the plotting libraries leaves run.lock, and with it every run's fingerprint, untouched.
A version that is locked stays as long as it fits; to take newer ones, delete the lock first.

Two more locks are for machines where torch is its CUDA build. What that build asks for stands in
cuda.lock, and kernels.lock holds what kernels.in asks for on top, with what builds it. They are
read from the indexes' metadata alone, on any machine: the files are gigabytes.

Every pin carries the hashes of all files of that version, so that one lock serves every platform.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from indexes import files, metadata
from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).resolve().parent
# In order of installation: a package stands in the first lock whose requirements need it.
NAMES = ("run", "report", "workflow", "dev")
# Only the CUDA build of torch asks for these, so they have locks of their own.
ACCELERATOR_PREFIXES = ("nvidia-", "cuda-", "triton")
# Their build needs torch and a compiler, so asking for their metadata would start one. What they
# import stands in kernels.in.
BUILT = ("mamba-ssm", "causal-conv1d")
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
         "platform_machine": "x86_64"}  # fmt: skip

Pins = dict[str, Version]


def requirements(name: str) -> list[Requirement]:
    """Read one requirement file, e.g. name "run" for run.in."""
    lines = (FOLDER / f"{name}.in").read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in stripped if line]


def locked(name: str) -> dict[str, tuple[Version, set[str]]]:
    """Read one lock: version and hashes by package; empty when there is no such lock yet."""
    path = FOLDER / f"{name}.lock"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    pins = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:\w+)*)", text, re.MULTILINE)
    return {
        package: (Version(version), set(re.findall(r"sha256:(\w+)", hashes)))
        for package, version, hashes in pins
    }


def resolve(kept: Pins) -> dict[str, dict]:
    """Let pip choose one version of everything: core metadata by canonical package name."""
    with tempfile.TemporaryDirectory() as scratch:
        report, constraints = Path(scratch) / "report.json", Path(scratch) / "kept.txt"
        lines = (f"{name}=={version}\n" for name, version in kept.items())
        constraints.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "--constraint", str(constraints)]
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


@cache
def wheel_metadata(package: str, version: Version) -> Metadata | None:
    """Return what a wheel for Linux says of itself; None where no index keeps its metadata."""
    suiting = [file for file in files(package) if file.version == version and file.suits_cuda]
    return next(filter(None, map(metadata, suiting)), None)


def needs(package: str, version: Version, extras: Iterable[str] = ()) -> list[Requirement]:
    """Return what a version asks for on Linux with an NVIDIA GPU."""
    if package in BUILT:
        return []
    known = wheel_metadata(package, version)
    if known is None:
        raise SystemExit(f"{package}=={version}: no index keeps the metadata of a wheel for Linux")
    environments = [default_environment() | LINUX | {"extra": extra} for extra in ("", *extras)]
    return [
        needed
        for needed in known.requires_dist or ()
        if needed.marker is None or any(map(needed.marker.evaluate, environments))
    ]


def choose(needed: Requirement, preferred: Pins) -> Version:
    """Return the preferred version of a package where it fits, else the newest usable one."""
    package = canonicalize_name(needed.name)
    if package in preferred and needed.specifier.contains(preferred[package]):
        return preferred[package]
    offered = {file.version for file in files(package) if not file.version.local}
    for version in sorted(needed.specifier.filter(offered), reverse=True):
        if package in BUILT or wheel_metadata(package, version) is not None:
            return version
    raise SystemExit(f"{needed}: no index has a fitting version with metadata")


def collect(roots: Iterable[Requirement], present: Pins, preferred: Pins) -> Pins:
    """Choose what `roots` need on top of what is present.

    Without backtracking: these packages ask for exact versions of one another, or for any. Where
    that fails, a line in kernels.in settles it.
    """
    chosen: Pins = {}
    seen: set[str] = set()
    queue = list(roots)
    while queue:
        needed = queue.pop(0)
        package = canonicalize_name(needed.name)
        version = (present | chosen).get(package) or choose(needed, preferred)
        if not SpecifierSet(str(needed.specifier), prereleases=True).contains(version):
            raise SystemExit(f"{needed}: {package}=={version} is chosen already")
        identity = f"{package}[{','.join(sorted(needed.extras))}]"
        if identity in seen or (package in present and not needed.extras):
            continue
        seen.add(identity)
        if package not in present:
            chosen[package] = version
        queue += needs(package, version, needed.extras)
    return chosen


def hashes(package: str, version: Version) -> set[str]:
    """Hashes of all files of a version, builds with a local label such as +cpu included."""
    return {file.sha256 for file in files(package) if file.version.public == str(version)}


def write(name: str, pins: Pins, source: str) -> None:
    """Write one lock; a pin that stays keeps its hashes: other machines may see other builds."""
    before = locked(name)
    with ThreadPoolExecutor(8) as pool:
        fresh = dict(zip(pins, pool.map(hashes, pins, pins.values()), strict=True))
    lines = [f"# Written by `make lock` from {source}; do not edit.\n"]
    for package, version in sorted(pins.items()):
        old, known = before.get(package, (None, set()))
        all_hashes = sorted(fresh[package] | (known if old == version else set()))
        if not all_hashes:
            raise SystemExit(f"{package}=={version}: no index lists a file of it")
        lines.append(" \\\n    ".join([f"{package}=={version}", *_options(all_hashes)]) + "\n")
    (FOLDER / f"{name}.lock").write_text("".join(lines), encoding="utf-8")
    print(f"containers/{name}.lock: {len(pins)} packages")


def _options(all_hashes: Iterable[str]) -> list[str]:
    return [f"--hash=sha256:{value}" for value in all_hashes]


def main() -> None:
    """Resolve once and write every lock."""
    everything = (*NAMES, "cuda", "kernels")
    kept = {package: pin for name in everything for package, (pin, _) in locked(name).items()}
    resolved = resolve(kept)
    locks: dict[str, Pins] = {}
    pinned: Pins = {}
    for name in NAMES:
        mine = closure(requirements(name), resolved) - set(pinned)
        # Without a local label such as +cpu: the index decides on the build.
        locks[name] = {
            package: Version(Version(resolved[package]["version"]).public) for package in mine
        }
        pinned |= locks[name]
    torch = locks["run"]["torch"]
    locks["cuda"] = collect(needs("torch", torch), locks["run"], kept)
    image = locks["run"] | locks["report"] | locks["cuda"]
    locks["kernels"] = collect(requirements("kernels"), image, kept | pinned)
    for name, pins in locks.items():
        source = (
            f"what the CUDA build of torch {torch} asks for" if name == "cuda" else f"{name}.in"
        )
        write(name, pins, source)


if __name__ == "__main__":
    main()
