"""What pip's package indexes offer: their addresses, their files, the files' hashes and metadata.

Where to look is asked of pip itself (configuration files, environment, its default), so that
nothing here names an index and a mirror works as it does for pip.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from packaging.metadata import Metadata
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version
from pip._internal.models.index import PyPI  # the only place that says pip's default index

PAGE_TYPES = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
LARGE = 64_000_000  # bytes


@dataclass(frozen=True)
class File:
    """A wheel or source archive that an index or a folder offers."""

    name: str
    version: Version
    url: str
    sha256: str

    @property
    def suits_cuda(self) -> bool:
        """Say whether it is a wheel that a 64-bit Linux with an NVIDIA GPU can use."""
        if not self.name.endswith(".whl") or self.version.local:
            return False
        platforms = {tag.platform for tag in parse_wheel_filename(self.name)[3]}
        return any(re.fullmatch(r"any|(many)?linux\w*_x86_64", name) for name in platforms)


@cache
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


def index_addresses() -> list[str]:
    """Return the addresses of all indexes, the main one first."""
    settings = pip_settings()
    main = settings.get("index-url", PyPI.simple_url)
    return [main, *settings.get("extra-index-url", "").split()]


@cache
def files(package: str) -> tuple[File, ...]:
    """Return every file of a package that pip could choose from."""
    found: list[File] = []
    for address in index_addresses():
        page = f"{address.rstrip('/')}/{package}/"
        found += _files_of(package, _read_page(page))
    for place in pip_settings().get("find-links", "").split():
        if Path(place).is_dir():
            local = ((path.name, path.as_uri(), "") for path in sorted(Path(place).iterdir()))
            found += _files_of(package, local)
        else:
            found += _files_of(package, _read_page(place))
    return tuple(found)


@cache
def metadata(file: File) -> Metadata | None:
    """Return a wheel's metadata, which most indexes keep beside it.

    Where they do not, a wheel of moderate size is fetched and read; None for a larger one.
    """
    try:
        return Metadata.from_email(_fetch(f"{file.url}.metadata")[0], validate=False)
    except urllib.error.URLError:
        pass
    with _open(file.url) as answer:
        if int(answer.headers.get("Content-Length", 0)) > LARGE:
            return None
        with zipfile.ZipFile(io.BytesIO(answer.read())) as wheel:
            (name,) = (name for name in wheel.namelist() if METADATA.fullmatch(name))
            return Metadata.from_email(wheel.read(name), validate=False)


def _files_of(package: str, links: Iterator[tuple[str, str, str]]) -> Iterator[File]:
    for name, url, sha256 in links:
        try:
            if name.endswith(".whl"):
                owner, version = parse_wheel_filename(name)[:2]
            else:
                owner, version = parse_sdist_filename(name)
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue
        if canonicalize_name(owner) == package:
            yield File(name, version, url, sha256 or _hash_local(url))


def _hash_local(url: str) -> str:
    """Hash a file of a folder, which says no hash itself."""
    path = urlsplit(url)
    if path.scheme != "file":
        raise SystemExit(f"{url}: its index gives no SHA-256, so it cannot be locked")
    with open(unquote(path.path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_page(page: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, address and SHA-256 of every file that a page lists; nothing without the page."""
    address = f"{page}index.html" if page.startswith("file:") and page.endswith("/") else page
    try:
        body, content_type = _fetch(address)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return
        raise
    except urllib.error.URLError:
        if address.startswith("file:"):
            return
        raise
    if "json" in content_type:
        for item in json.loads(body)["files"]:
            yield item["filename"], urljoin(page, item["url"]), item["hashes"].get("sha256", "")
        return
    for link in _Links(body.decode()).found:
        url, fragment = urldefrag(urljoin(page, link))
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        yield name, url, fragment.removeprefix("sha256=") if "sha256=" in fragment else ""


class _Links(HTMLParser):
    """Collects the addresses that a page links to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _fetch(url: str) -> tuple[bytes, str]:
    with _open(url) as answer:
        return answer.read(), answer.headers.get("Content-Type", "")


def _open(url: str) -> Any:
    request = urllib.request.Request(url, headers={"Accept": PAGE_TYPES})
    context = ssl.create_default_context(cafile=pip_settings().get("cert"))
    return urllib.request.urlopen(request, context=context, timeout=180)
