"""Print as JSON what the image around this process holds; containers/build.py runs it in there.

It imports the standard library only. Python's packages are those of the environment and of the
interpreter below it, Debian's those that dpkg knows, none where there is no dpkg.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, distributions

LICENCE = "License :: "
LONGEST = 100
"""Characters of what still is a licence's name; some packages put its whole text there."""


def licence(package: Distribution) -> str | None:
    """Return a package's SPDX expression, or what else its metadata calls its licence."""
    metadata = package.metadata
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith(LICENCE)]
    named = [line.rpartition(" :: ")[2] for line in classifiers]
    for value in (metadata.get("License-Expression"), metadata.get("License"), *named):
        if value and value != "UNKNOWN" and "\n" not in value and len(value) <= LONGEST:
            return value
    return None


def of_python() -> list[dict[str, str | None]]:
    """Return the installed distributions of this environment and of the Python it was made with."""
    below = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    folders = [*sys.path, sysconfig.get_path("purelib", "posix_prefix", below)]
    return [
        {"name": package.metadata["Name"], "version": package.version, "licence": licence(package)}
        for package in distributions(path=folders)
    ]


def of_debian() -> list[dict[str, str]]:
    """Return the packages that dpkg has installed."""
    if shutil.which("dpkg-query") is None:
        return []
    keys = ("state", "name", "version", "architecture")
    fields = "\t".join(("${db:Status-Abbrev}", "${Package}", "${Version}", "${Architecture}"))
    listing = subprocess.check_output(
        ["dpkg-query", "--show", f"--showformat={fields}\n"], text=True
    )
    packages = (dict(zip(keys, line.split("\t"), strict=True)) for line in listing.splitlines())
    return [package for package in packages if package.pop("state").strip() == "ii"]


if __name__ == "__main__":
    system = platform.freedesktop_os_release()
    found = {
        "system": {"name": system["ID"], "version": system.get("VERSION_ID", "")},
        "interpreter": platform.python_version(),
        "python": of_python(),
        "debian": of_debian(),
    }
    json.dump(found, sys.stdout)
