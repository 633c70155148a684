"""The entities of an RO-Crate: files with their checksums, tools, actions, values.

A thin layer over the library `rocrate`, which writes the files and the JSON-LD: what is said of a
file, and how things that several entities share get one name each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from drama.files import sha256_file
from drama.pipeline.artifacts.records import Artifact

if TYPE_CHECKING:
    from rocrate.model.entity import Entity
    from rocrate.rocrate import ROCrate

VERSION = "1.1"
"""Of RO-Crate: the one that the profiles below build upon."""
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
TERMS = "https://w3id.org/ro/terms/workflow-run"
FORMATS = {
    ".json": "application/json",
    ".parquet": "application/vnd.apache.parquet",
    ".md": "text/markdown",
    ".html": "text/html",
    ".csv": "text/csv",
    ".svg": "image/svg+xml",
    ".smk": "text/plain",
    ".cff": "application/yaml",
    "": "text/plain",
}
"""Media types, by the suffix of a file's name; weights are just bytes."""


class Graph:
    """A crate that is being put together; nothing is written before `write`.

    Attributes:
        crate: rocrate's.
        bytes: of all files in it so far.
    """

    def __init__(self) -> None:
        from rocrate.rocrate import ROCrate

        self.crate: ROCrate = ROCrate(version=VERSION)
        self.crate.metadata.extra_contexts.append(f"{TERMS}/context")
        self.crate.root_dataset["conformsTo"] = [
            self.entity(profile, "CreativeWork", name=name, version=profile.rpartition("/")[2])
            for profile, name in PROFILES.items()
        ]
        self.bytes = 0

    @property
    def root(self) -> Entity:
        """The crate itself."""
        return self.crate.root_dataset

    def entity(self, name: str, kind: str | list[str], /, **properties: Any) -> Entity:
        """Return the entity of this name, which is added when it is new."""
        from rocrate.model.contextentity import ContextEntity

        if name.startswith("#"):
            name = quote(name, safe="#/@=+")
        known = self.crate.get(name)
        if known is not None:
            return known
        return self.crate.add(ContextEntity(self.crate, name, {"@type": kind, **said(properties)}))

    def known(self, name: str) -> Entity:
        """Return the file that was added under a name."""
        found = self.crate.get(name)
        assert found is not None, f"{name} was not added"
        return found

    def describe(self, entity: Entity, **properties: Any) -> None:
        """Say something of an entity; properties without a value are passed over."""
        for name, value in said(properties).items():
            entity[name] = value

    def image(self, digest: str) -> Entity:
        """Return a container image, by its SHA-256."""
        return self.entity(
            f"#image-{digest}", "ContainerImage", name="Apptainer image", sha256=digest,
            additionalType={"@id": f"{TERMS}#SIFImage"},
        )  # fmt: skip

    def file(self, source: Path, name: str, **properties: Any) -> Entity:
        """Add a file, to be copied to a place in the crate.

        Raises:
            OSError: when it cannot be read.
        """
        self.bytes += source.stat().st_size
        known = described(name, source.stat().st_size, sha256_file(source))
        return self.crate.add_file(source, name, properties=known | said(properties))

    def absent(self, name: str, artifact: Artifact) -> Entity:
        """Add a file that is not in the crate, by its place, size and checksum.

        Its identifier is local (`#runs/...`), as that of a thing that is described and not here.
        """
        known = described(name, artifact.bytes, artifact.sha256)
        return self.entity(f"#{name}", "File", **known, description="Not in this crate")

    def workflow(self, source: Path, name: str, **properties: Any) -> Entity:
        """Add the main workflow, a Snakefile."""
        kinds = ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"]
        known = described(name, source.stat().st_size, sha256_file(source))
        return self.crate.add_workflow(
            source, name, main=True, lang="snakemake",
            properties={"@type": kinds} | known | said(properties),
        )  # fmt: skip

    def action(self, name: str, instrument: Entity, /, **properties: Any) -> Entity:
        """Add what was done, with a tool."""
        action = self.entity(
            f"#{name}", "CreateAction", instrument=instrument,
            actionStatus="http://schema.org/CompletedActionStatus", **properties,
        )  # fmt: skip
        self.root.append_to("mentions", action)
        return action

    def values(self, named: Mapping[str, str]) -> list[Entity]:
        """Return named values, such as versions, which many actions share."""
        return [
            self.entity(f"#{name}={value}", "PropertyValue", name=name, value=value)
            for name, value in named.items()
        ]

    def write(self, folder: Path) -> None:
        """Write all files and ro-crate-metadata.json into a folder."""
        self.crate.write(folder)


def described(name: str, size: int, sha256: str) -> dict[str, Any]:
    """Return what is said of every file."""
    media = FORMATS.get(Path(name).suffix, "application/octet-stream")
    return {"name": name, "contentSize": str(size), "sha256": sha256, "encodingFormat": media}


def said(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties that have a value; one of several is written as itself."""
    found = {}
    for name, value in properties.items():
        if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
            value = list(value)
            value = value[0] if len(value) == 1 else value
        if value not in (None, "", []):
            found[name] = value
    return found
