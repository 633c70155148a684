"""YAML as people mean it, and assignments; what is said of what is neither."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drama.errors import ConfigurationError
from drama.pipeline.config import Experiment, Preset, load_preset, preset_layers
from drama.pipeline.layers import Layer, parse_assignment, parse_yaml, read_mapping, resolve

PRESETS = Path(__file__).resolve().parents[2] / "config" / "presets"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 100_000), ("-1.5e+3", -1500), (".5", 0.5), ("5.", 5),
        ("1.0e5", 100_000), ("1e-1", 0.1), ("1e16", 1e16), ("-.inf", -math.inf),
        ("1.0e-3", 1e-3), ("4", 4), ("-3", -3), ("100_000", 100_000), (".inf", math.inf),
        ("010", "010"), ("0x1F", "0x1F"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("true", True), ("no", False),
        ("", None), ("[1, 2.5e0]", [1, 2.5]), ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)  # fmt: skip
def test_yaml_reads_what_people_mean(text: str, value: object) -> None:
    read = parse_yaml(text, "here")
    assert read == value and type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_written_by_python_is_read_back(value: float) -> None:
    assert parse_yaml(repr(value), "here") == value


@given(st.integers())
def test_an_integer_written_by_python_is_read_back(value: int) -> None:
    assert parse_yaml(str(value), "here") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "here, line 2: .*'a' is given twice"),
        ("x:\n  a: 1\n  b: 2\n  a: 3\n", "here, line 4: .*'a' is given twice"),
        ("? [a, b]\n: 1\n", "here, line 1: .*cannot be a key"),
        ("? {a: 1}\n: 1\n", "here, line 1: .*cannot be a key"),
        ("a: [1, 2\n", "here, line 2: "),
        ("a:\tb\n\tc\n", "here, line "),
        ("--- 1\n--- 2\n", "here, line 2: "),
        ("a: !!python/object/apply:os.system [true]\n", "here, line 1: .*python/object"),
        ("a: !!binary aGVsbG8=\n", "here: not valid YAML"),
        ("a: !!set {b}\n", "here: not valid YAML"),
        ("&a {b: *a}\n", "here: not valid YAML"),
        ("a: \0\n", "here: not valid YAML"),
        ('a: "\\ud800"\n', "here: not valid YAML: not UTF-8 text"),
        ("[" * 3000, "here: not valid YAML"),
        (f"!!float {'1:' * 200}0\n", "here: not valid YAML: a tag does not fit its value"),
    ],
)
def test_what_is_not_yaml_is_located(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse_yaml(text, "here")


@given(st.binary(max_size=60) | st.text("ab:-[]{}&*!?|>'\"%@`#,<1. \n\t", max_size=40))
def test_whatever_lies_in_a_file_is_read_or_explained(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert isinstance(read_mapping(path), dict)
    except ConfigurationError as error:
        assert str(path) in str(error)


# --- assignments ---------------------------------------------------------------------------------


def test_an_assignment_is_a_typed_layer() -> None:
    layer = parse_assignment("world_model.optimiser.learning_rate=1e-3")
    assert layer.data == {"world_model": {"optimiser": {"learning_rate": 1e-3}}}
    assert parse_assignment(" replay.sampling = uniform ").data == {
        "replay": {"sampling": "uniform"}
    }
    assert parse_assignment("world_model.channels=[1, 2]").data["world_model"] == {
        "channels": [1, 2]
    }


@pytest.mark.parametrize("text", ["", "=", "=5", "training.total_steps", "a=[1"])
def test_an_assignment_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--set"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("replay.capacity", 10_000_000),
        ("world_model.batch_size", 65_536),
        ("world_model.sequence_length", 10_000),
        ("world_model.optimiser.warmup_updates", 10_000_000),
        ("behaviour.contexts", 65_536),
        ("behaviour.context_length", 10_000),
        ("behaviour.horizon", 10_000),
        ("behaviour.acting_window", 10_000),
        ("behaviour.optimiser.warmup_updates", 10_000_000),
        ("training.world_model_every", 1_000_000),
        ("training.behaviour_every", 1_000_000),
        ("training.log_every", 1_000_000),
        ("evaluation.episodes", 100_000),
        ("evaluation.environments", 1000),
        ("evaluation.enough_same", 100_000),
        ("training.total_steps", 1_000_000_000),
    ],
)
def test_a_number_beyond_all_sense_is_refused(key: str, most: int) -> None:
    """Only by its own bound: what is too large for a run of this length is another matter."""
    section, *rest = key.split(".")
    assigned = parse_assignment(f"{key}={most}")
    value: Any = resolve(Preset, [*preset_layers("xs", PRESETS), assigned])
    for name in (section, *rest):
        value = getattr(value, name)
    assert value == most
    for more in (f"{most + 1}", f"{2 * most:e}"):
        with pytest.raises(ConfigurationError, match=f"--set: {key} = .*must be at most {most}$"):
            load_preset("xs", parse_assignment(f"{key}={more}"), folder=PRESETS)


@pytest.mark.parametrize("text", ["160000", "160_000", "1.6e5", "16e4", "160000.0"])
def test_a_whole_number_is_one_however_it_is_written(text: str) -> None:
    preset = load_preset("xs", parse_assignment(f"training.total_steps={text}"), folder=PRESETS)
    assert '"total_steps":160000,' in preset.model_dump_json(), "or its fingerprint is another"


@pytest.mark.parametrize("text", ["1", "1.0", "1e0"])
def test_a_number_stays_one_however_it_is_written(text: str) -> None:
    preset = load_preset("xs", parse_assignment(f"replay.alpha={text}"), folder=PRESETS)
    assert '"alpha":1.0,' in preset.model_dump_json(), "or its fingerprint is another"


def test_what_is_not_text_on_the_command_line_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"there: preset = '.udcff': not UTF-8 text"):
        resolve(Experiment, [Layer("there", {"preset": "\udcff"})])
