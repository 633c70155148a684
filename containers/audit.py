"""Is what is installed what the lock files pin, file by file? Asks nothing of the network.

A lock's hashes are checked as a package is downloaded. This looks at what has become of it since:
another version, a requirement that is not met, a file that was changed. Packages that no lock names
are named. Known holes in these versions it cannot know; `pip-audit -r containers/run.lock` asks
about them where there is a network.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = {"drama-world-model", "pip"}
"""This project, and what a virtual environment comes with."""
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+)", re.MULTILINE)


def main(names: Collection[str]) -> int:
    """Print what is not as it should be, of some packages or all; returns 1 if anything is not."""
    locks = sorted(Path(__file__).parent.glob("*.lock"))
    pins = defaultdict(set)
    for lock in locks:
        for name, version in PIN.findall(lock.read_text(encoding="utf-8")):
            pins[canonicalize_name(name)].add(_public(version))
    # The first of a name is the one that Python imports.
    installed = {canonicalize_name(each.name): each for each in reversed([*distributions()])}
    known = {name for name in installed if name in pins and (name in names or not names)}
    problems = [text for name in sorted(known) for text in _problems(name, installed, pins[name])]
    for text in problems:
        print(text, file=sys.stderr)
    if others := sorted(installed.keys() - pins.keys() - OWN):
        print(f"Of no lock file, and not looked at: {', '.join(others)}")
    if not problems:
        print(f"{len(known)} packages are as the lock files have them, file by file")
    return bool(problems)


def _problems(
    name: str, installed: Mapping[str, Distribution], versions: Collection[str]
) -> Iterator[str]:
    package = installed[name]
    what = f"{name} {package.version}"
    if _public(package.version) not in versions:
        yield f"{what}: the locks pin {', '.join(sorted(versions))}; `make setup` installs it"
    for text in package.requires or ():
        needed = Requirement(text)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(needed.name) not in installed:
            yield f"{what}: needs {text}, which is not installed"
    for file in package.files or ():
        if file.hash and not _holds(file):
            yield f"{what}: {file} is not what was installed; `make clean setup` puts it back"


def _public(version: str) -> str:
    """Return a version without what says how it was built, as in 2.13.0+cpu."""
    return version.partition("+")[0]


def _holds(file: PackagePath) -> bool:
    path = Path(str(file.locate()))
    if not path.is_file():
        return False
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, file.hash.mode).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
