"""What CITATION.cff says of the project: license, authors, the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from drama.errors import ConfigurationError, reason
from drama.pipeline.layers import LARGEST, load_yaml
from drama.reading import read_text

CITATION = Path("CITATION.cff")

Text = Annotated[str, Field(min_length=1, max_length=2_000)]


class Author(BaseModel):
    """A person, by given and family name, or a group of them, by its name."""

    model_config = ConfigDict(frozen=True)

    name: Text | None = None
    given: Annotated[Text | None, Field(alias="given-names")] = None
    family: Annotated[Text | None, Field(alias="family-names")] = None

    @property
    def kind(self) -> str:
        """What schema.org calls it."""
        return "Organization" if self.name else "Person"

    def __str__(self) -> str:
        return self.name or " ".join(filter(None, (self.given, self.family)))


class Paper(BaseModel):
    """The publication whose method the project implements."""

    model_config = ConfigDict(frozen=True)

    title: Text
    url: Annotated[str, Field(pattern=r"^https?://\S{1,500}$")]
    year: int
    authors: Annotated[tuple[Author, ...], Field(min_length=1, max_length=1_000)]

    @property
    def bibtex(self) -> str:
        """Its entry in a bibliography."""
        by = " and ".join(map(str, self.authors))
        fields = {"title": self.title, "author": by, "year": self.year, "url": self.url}
        said = ", ".join(f"{name}={{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{drama, {said}}}"


class Citation(BaseModel):
    """What is said of the project wherever its results go; without the file, the license alone."""

    model_config = ConfigDict(frozen=True)

    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]{1,100}$")] = "Apache-2.0"
    authors: Annotated[tuple[Author, ...], Field(max_length=1_000)] = ()
    paper: Annotated[Paper | None, Field(alias="preferred-citation")] = None

    @property
    def license_url(self) -> str:
        """Where the license, named as SPDX does, can be read."""
        return f"https://spdx.org/licenses/{self.license}"


def read_citation() -> Citation:
    """Read CITATION.cff in the working directory, if there is one.

    Raises:
        ConfigurationError: when it does not say what such a file says.
    """
    if not CITATION.is_file():
        return Citation()
    try:
        document = load_yaml(read_text(CITATION, LARGEST), yaml.SafeLoader)
        return Citation.model_validate(document)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{CITATION}: {reason(error)}") from None
