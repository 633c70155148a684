"""Layers of settings: read from YAML and `--set`, laid over each other; errors that help.

Every layer remembers where it was written, so that an error can name the key, the value, the file
and what would have been allowed.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from drama.errors import ConfigurationError, brief, cut, reason
from drama.files import unflatten
from drama.reading import DEEPEST, MOST, read_text

LARGEST = 1 << 18
"""Bytes of a configuration file, which is read some 50 000 a second."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, 010, 1:30 and dates are words, and no key comes twice.

    A number without a fraction is a whole one, however it is written: 1e5 as much as 100000.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem=f"{brief(key)} cannot be a key: a key is a word",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {brief(key)} is given twice",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        value: float = self.construct_yaml_float(node)
        # Beyond 2**53 a floating-point number no longer holds every whole number.
        return int(value) if value.is_integer() and abs(value) <= 2**53 else value


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(?:0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [f for f in forms if f[0] not in {*_NUMBERS, "tag:yaml.org,2002:timestamp"}]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


PLAIN: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's own way to read plain values, the quicker one."""


def load_yaml(text: str, kind: type[Any] = _Loader) -> Any:
    """Load one YAML document of bounded depth and size; what aliases repeat counts each time.

    Args:
        text: the document.
        kind: PyYAML's loader, a safe one.

    Raises:
        YAMLError, ValueError: when it is not YAML, nested too deeply or too large.
    """
    _check_bounds(yaml.parse(text, Loader=kind))
    try:
        return yaml.load(text, Loader=kind)  # nosec B506
    except (LookupError, ArithmeticError, AttributeError, TypeError) as error:  # `!!bool maybe`
        raise ValueError("a tag does not fit its value") from error


def _check_bounds(events: Iterator[yaml.Event]) -> None:
    """Bound what would be built, from events alone: building is recursive, in C without an end."""
    anchored: dict[str, tuple[int, int]] = {}
    around: list[tuple[str | None, int, int]] = []  # what is open: anchor, size and depth so far
    for event in events:
        anchor, size, depth = getattr(event, "anchor", None), 1, 1
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((anchor, 1, 1))
            if len(around) > DEEPEST:
                raise ValueError("nested too deeply")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = around.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size += len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if any(name == anchor for name, *_ in around):
                raise ValueError(f"*{cut(str(anchor))} stands inside what it repeats")
            size, depth = anchored.get(str(anchor), (1, 1))  # an unknown one is refused later
            anchor = None
        else:
            continue
        if anchor is not None:
            anchored[anchor] = size, depth
        if around:
            name, before, deepest = around.pop()
            around.append((name, before + size, max(deepest, depth + 1)))
            if before + size > MOST:
                raise ValueError(f"more than {MOST} characters where aliases are written out")
            if len(around) + depth > DEEPEST:
                raise ValueError("nested too deeply")


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigurationError: naming `source` and the line, when the text is not YAML.
    """
    try:
        data = load_yaml(text)
        # Refuses what tags, anchors and escapes can make beyond plain values.
        json.dumps(data, ensure_ascii=False).encode()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        assert mark, "every such error of a text has its place"
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(
            f"{source}, line {mark.line + 1}: not valid YAML: {problem}\n{mark.get_snippet()}"
        ) from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{source}: not valid YAML: {reason(error)}") from None
    return data


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigurationError: when the file is missing or is something else.
    """
    try:
        text = read_text(path, LARGEST)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: {reason(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {reason(error)}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else brief(data)
        raise ConfigurationError(f"{path}: expected keys and values, found {found}")
    return data


# --- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A nested mapping of settings and where it was written."""

    source: str
    data: Mapping[str, Any]
    prefix: str = ""

    def where(self, key: str) -> str:
        """Return where a key was written, for people."""
        return f"{self.source}: {cut('.'.join(filter(None, (self.prefix, key))), 200)}"


def parse_assignment(text: str) -> Layer:
    """Turn `section.key=value` from the command line into a layer.

    Raises:
        ConfigurationError: when there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f"--set {cut(text)}: expected section.key=value")
    data = {key.strip(): parse_yaml(value, f"--set {cut(text)}")}
    return Layer("--set", unflatten(data, "."))


Model = TypeVar("Model", bound=BaseModel)


def resolve(model: type[Model], layers: Sequence[Layer]) -> Model:
    """Merge layers, later ones over earlier ones, and validate the result.

    Raises:
        ConfigurationError: naming key, value, file and the allowed values.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, Layer] = {}
    for layer in layers:
        for key, value in _leaves(model, layer, layer.data):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # as a shell hands over what is none
                where = layer.where(key)
                raise ConfigurationError(f"{where} = {brief(value)}: {reason(error)}") from None
            merged[key], origin[key] = value, layer
    try:
        # Through JSON, because strict validation takes a JSON array for a tuple, not a list.
        return model.model_validate_json(json.dumps(unflatten(merged, ".")))
    except ValidationError as error:
        explained = (_explain(details, origin, layers) for details in error.errors())
        raise ConfigurationError("\n".join(itertools.islice(explained, 10))) from None


def _leaves(
    model: type[BaseModel], layer: Layer, data: Any, section: str = ""
) -> Iterator[tuple[str, Any]]:
    """Walk a layer along the model's sections, refusing keys that the model does not have."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{layer.where(section)} = {brief(data)}: expected a section with keys "
            f"{', '.join(fields)}"
        )
    for name, value in data.items():
        key = f"{section}.{name}".removeprefix(".")
        if name not in fields:
            raise ConfigurationError(
                f"{layer.where(key)} = {brief(value)}: unknown key. {nearest(str(name), fields)}"
            )
        inner = fields[name]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaves(inner, layer, value, key)
        else:
            yield key, value


# --- wording -------------------------------------------------------------------------------------


def nearest(word: str, allowed: Any) -> str:
    """Say what was allowed, with the closest match to `word` first when there is one."""
    words = list(allowed)
    return f"{closest(word, words)}Allowed: {', '.join(words)}"


def few(names: Sequence[str]) -> str:
    """Return the first three of some names, and how many more there are, for people."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def closest(word: str, words: Sequence[str]) -> str:
    """Ask for the closest match to `word`, with a space behind; nothing when there is none."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


def _explain(details: ErrorDetails, origin: Mapping[str, Layer], layers: Sequence[Layer]) -> str:
    location = [str(part) for part in details["loc"]]
    # The location of an item inside a list is longer than the key that holds the list.
    for length in range(len(location), 0, -1):
        key = ".".join(location[:length])
        if key in origin:
            item = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in location[length:])
            return f"{origin[key].where(key)}{item} = {brief(details['input'])}: {problem(details)}"
    sources = ", ".join(dict.fromkeys(layer.source for layer in layers if layer.data))
    missing = details["type"] == "missing"
    trouble = "missing; give it a value" if missing else problem(details)
    return f"{sources}: {'.'.join(location)}: {trouble}"


_PROBLEMS = {
    "bool_type": "expected true or false",
    "dict_type": "expected keys and values",
    "finite_number": "expected a finite number",
    "float_type": "expected a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "expected a whole number",
    "json_invalid": "not JSON, or cut off",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "expected a list such as [1, 2]",
    "missing": "too few are listed",
    "string_type": "expected a word",
    "too_long": "at most {max_length} can be listed",
    "too_short": "at least {min_length} must be listed",
    "tuple_type": "expected a list such as [1, 2]",
}
"""What Pydantic's kinds of errors are called to people; the others by Pydantic's own words."""


def problem(details: ErrorDetails) -> str:
    """Say what Pydantic found wrong with a value."""
    context = details.get("ctx", {})
    if "expected" in context:
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return nearest(str(details["input"]), choices)
    if details["type"] in _PROBLEMS:
        return _PROBLEMS[details["type"]].format_map(context)
    return details["msg"].removeprefix("Value error, ")
