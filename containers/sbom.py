"""The list of what an image holds (SBOM), as CycloneDX, which scanners for known flaws read.

It is made from what is in the image and from nothing else: the same image gives the same bytes.
"""

from __future__ import annotations

import subprocess
import uuid
from datetime import datetime
from pathlib import Path
from typing import Annotated

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from pydantic import BaseModel, ConfigDict, Field

CONTENTS = Path(__file__).with_name("contents.py")
DIGEST = "@sha256:"

Word = Annotated[str, Field(pattern=r"^[^\s]{1,200}$")]
"""A name or a version."""


class Read(BaseModel):
    """What was printed in an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PythonPackage(Read):
    """An installed distribution, its licence as its metadata calls it."""

    name: Word
    version: Word
    licence: Annotated[str, Field(min_length=1, max_length=100)] | None


class DebianPackage(Read):
    """An installed package of Debian."""

    name: Word
    version: Word
    architecture: Word


class System(Read):
    """What /etc/os-release says."""

    name: Word
    version: str


class Contents(Read):
    """What contents.py prints."""

    system: System
    interpreter: Word
    python: tuple[PythonPackage, ...]
    debian: tuple[DebianPackage, ...]


def place_of(image: Path) -> Path:
    """Return the file beside an image that lists what is in it."""
    return image.with_suffix(".cdx.json")


def contents(image: Path) -> Contents:
    """Ask an image what it holds.

    Raises:
        CalledProcessError: when Apptainer or the question fails.
        ValueError: when the answer is none.
    """
    call = ["apptainer", "--quiet", "exec", "--cleanenv", "--contain", image, "python", "-I", "-"]
    with CONTENTS.open("rb") as question:
        answer = subprocess.run(call, stdin=question, stdout=subprocess.PIPE, check=True).stdout
    return Contents.model_validate_json(answer)


def bill(held: Contents, version: str, digest: str, base: str, built: datetime) -> str:
    """Return the list of what an image holds.

    Args:
        held: what it holds.
        version: the hash in its name.
        digest: the SHA-256 of its file.
        base: what it was built on, as Apptainer was told.
        built: when.
    """
    image = Component(
        name="drama",
        version=version,
        type=ComponentType.CONTAINER,
        bom_ref="image",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
    )
    bom = Bom(
        components={part.bom_ref.value: part for part in _parts(held, base)}.values(),
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"sha256:{digest}"),
        metadata=BomMetaData(component=image, timestamp=built),
    )
    bom.register_dependency(image, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _parts(held: Contents, base: str) -> list[Component]:
    system, licences = held.system, LicenseFactory()
    distribution = "-".join(filter(None, (system.name, system.version)))
    parts = [
        _base(base),
        Component(
            name=system.name,
            version=system.version or None,
            type=ComponentType.OPERATING_SYSTEM,
            bom_ref=distribution,
        ),
        _component(PackageURL("generic", None, "python", held.interpreter)),
    ]
    for item in held.python:
        part = _component(PackageURL("pypi", None, item.name, item.version))
        if item.licence is not None:
            part.licenses.add(licences.make_from_string(item.licence))
        parts.append(part)
    for package in held.debian:
        where = {"arch": package.architecture, "distro": distribution}
        purl = PackageURL("deb", system.name, package.name, package.version, where)
        parts.append(_component(purl))
    return parts


def _component(purl: PackageURL) -> Component:
    return Component(
        name=purl.name,
        version=purl.version,
        type=ComponentType.APPLICATION if purl.type == "generic" else ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
    )


def _base(base: str) -> Component:
    """Return what the image was built on; a folder by its name alone."""
    name, found, digest = base.partition(DIGEST)
    if not found:
        return Component(name=Path(base).name, type=ComponentType.CONTAINER, bom_ref="base")
    namespace, _, name = name.rpartition("/")
    return Component(
        name=name,
        version=f"sha256:{digest}",
        type=ComponentType.CONTAINER,
        bom_ref="base",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        purl=PackageURL("docker", namespace, name, f"sha256:{digest}"),
    )
