"""Build the container image that today's lock files ask for: run it with `make container`.

The image is written under another name and renamed when it is whole. Beside it stand a note, which
says what it is, and the list of what is in it (SBOM). Nothing is done when it is there. How this
machine reaches package indexes is lent to the build and stays out of the image.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sbom

from drama.errors import reason
from drama.files import remove_leftovers, replacing, sha256_file, write_json, write_text
from drama.pipeline.artifacts.image import (
    DEFINITION,
    IMAGES,
    ImageMissing,
    Variant,
    current_image,
    hold_image,
    image_hash,
    note_of,
)
from drama.runs.folder import SHORT

ROOT = Path(__file__).resolve().parents[1]
LENT = Path("/mnt")
"""Where drama.def finds pip.conf, and what that names, while it is built."""
SQUASH = "-comp gzip -Xcompression-level 1"  # minutes faster than the default, a tenth larger


def pip_settings() -> dict[str, str]:
    """Return what pip is configured with, by option; the environment counts most, as for pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in found:
            found[section][option] = ast.literal_eval(value)
    return found["global"] | found["install"] | found[":env:"]


def lend_pip_settings(folder: Path) -> list[str]:
    """Write a pip.conf that says inside the build what this machine's pip is configured with.

    Args:
        folder: an empty folder, which the build sees as LENT.

    Returns:
        Bind mounts, source:target, of the folder and of local package folders that pip uses.
    """
    settings = pip_settings()
    binds = [f"{folder}:{LENT}:ro"]

    def lend(source: Path) -> Path:
        name = f"packages-{len(binds)}"
        (folder / name).mkdir()
        binds.append(f"{source}:{LENT / name}:ro")
        return LENT / name

    def inside(address: str) -> str:
        parts = urlsplit(address)
        if parts.scheme == "file":
            # The pages of an index in a folder link to files beside that folder.
            path = Path(unquote(parts.path))
            return (lend(path.parent) / path.name).as_uri()
        return str(lend(Path(address))) if Path(address).is_dir() else address

    lent = {key: settings[key] for key in ("proxy", "trusted-host") if key in settings}
    for key in ("index-url", "extra-index-url", "find-links"):
        if key in settings:
            lent[key] = " ".join(map(inside, settings[key].split()))
    if "cert" in settings:
        shutil.copyfile(settings["cert"], folder / "cert.pem")
        lent["cert"] = str(LENT / "cert.pem")
    parser = configparser.RawConfigParser()
    parser["global"] = lent
    with (folder / "pip.conf").open("w", encoding="utf-8") as file:
        parser.write(file)
    return binds


def command(variant: Variant, base: str | None, binds: list[str], image: Path) -> list[str]:
    """Return the call of apptainer that builds an image."""
    arguments = {"variant": variant}
    if base is not None:
        local = Path(base).expanduser()
        arguments["bootstrap"] = "localimage" if local.exists() else "docker"
        arguments["base"] = str(local.resolve()) if local.exists() else base
    call = ["apptainer", "build", "--force", "--mksquashfs-args", SQUASH]
    call += [word for bind in binds for word in ("--bind", bind)]
    call += [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
    return [*call, str(image), str(DEFINITION)]


def base_of_definition() -> str:
    """Return the base that an image has when no other one is named."""
    found = re.search(r"^ *base=(\S+)$", DEFINITION.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{DEFINITION} names no base"
    return found[1]


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another build in this folder to end."""
    IMAGES.mkdir(exist_ok=True)
    with (IMAGES / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(variant: Variant, base: str | None) -> None:
    """Build today's image of a variant, with the note and the list of its contents beside it.

    Raises:
        CalledProcessError: when Apptainer fails; nothing is written then.
        ValueError: when the image does not say what it holds, likewise.
    """
    path, name = current_image(variant), image_hash(variant)
    remove_leftovers(IMAGES)
    with replacing(path) as temporary, tempfile.TemporaryDirectory() as lent:
        subprocess.run(command(variant, base, lend_pip_settings(Path(lent)), temporary), check=True)
        digest, built = sha256_file(temporary), datetime.now(UTC).replace(microsecond=0)
        origin = base or base_of_definition()
        held = sbom.contents(temporary)
        write_text(sbom.place_of(path), sbom.bill(held, name[:SHORT], digest, origin, built))
        note = {
            "sha256": digest,
            "bytes": temporary.stat().st_size,
            "variant": variant,
            "lock": name,
            "base": origin,
            "built": built.isoformat(),
            "sbom": sbom.place_of(path).name,
        }
        write_json(note_of(path), note)


def main() -> int:
    """Build the image unless it is there; say what is missing where it cannot be built."""
    parser = argparse.ArgumentParser(description="Build the container image.")
    parser.add_argument("--variant", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--base", help="a Docker Hub image, or a folder with a root file system")
    options = parser.parse_args()
    os.chdir(ROOT)
    path = current_image(options.variant)
    named_path = options.base is not None and options.base.startswith(("/", ".", "~"))
    if named_path and not Path(options.base).expanduser().exists():
        return _refuse(f"{options.base}: no such folder or image", 2)
    with alone():
        with suppress(ImageMissing):
            hold_image(options.variant)
            print(f"{path}: there already")
            return 0
        if shutil.which("apptainer") is None:
            return _refuse(
                "apptainer was not found. Install it (apptainer.org), or build on a machine that "
                f"has it and copy {path} with its .json and .cdx.json",
                1,
            )
        try:
            build(options.variant, options.base)
        except subprocess.CalledProcessError as error:
            return _refuse(
                f"apptainer stopped with exit code {error.returncode}; the cause stands above. "
                "No image was written",
                1,
            )
        except ValueError as error:  # pydantic's ValidationError is one
            return _refuse(
                f"what the image holds cannot be listed: {reason(error)}. No image was written", 1
            )
    print(f"{path}: built")
    return 0


def _refuse(reason: str, code: int) -> int:
    print(f"make container: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
