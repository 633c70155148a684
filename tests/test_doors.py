"""Every file that a stranger may have written, damaged in every way: refused in words, or read.

Each door is tried with a valid file that was changed a little: bytes, JSON values, nesting, kinds
of files. `DRAMA_FUZZ_CASES` is the number of cases for each door; the few of a usual run are the
same each time. Hypothesis draws as many again where Atheris guides it, by the code that a case
reaches: `faults/guided.py`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from drama.errors import LONGEST, DramaError, reason, shown
from drama.pipeline import fingerprints
from drama.pipeline.artifacts.crate.citation import CITATION, read_citation
from drama.pipeline.artifacts.image import running_digest
from drama.pipeline.artifacts.lockfile import LOCK, read_ledger
from drama.pipeline.artifacts.outlook import read_outlook
from drama.pipeline.artifacts.outlook import show as show_outlook
from drama.pipeline.artifacts.overview import overview
from drama.pipeline.artifacts.records import evaluations_of, read_record
from drama.pipeline.artifacts.repository import PROCESSES, Repository
from drama.pipeline.artifacts.stages import DVC_YAML, covered_results
from drama.pipeline.artifacts.status import read_statuses
from drama.pipeline.artifacts.store import _out
from drama.pipeline.artifacts.verify import Finding, verify
from drama.pipeline.artifacts.weights import read_weights
from drama.pipeline.campaign import read_campaign
from drama.pipeline.config import load_experiment, load_preset, read_recipe_text
from drama.pipeline.history import earlier_run
from drama.pipeline.plans import read_plan
from drama.pipeline.recipes import read_evaluation_recipe, read_recipe, run_files
from drama.report import read_partial, read_returns
from drama.report.contents import read_report
from drama.report.page import _csv, _rows, _schema
from drama.report.scores import read_baselines, read_curve
from drama.runs.locks import lock_of, read_holder

ROOT = Path(__file__).resolve().parents[1]
CASES = int(os.environ.get("DRAMA_FUZZ_CASES", "0"))
CATCH = Path("results/learn/catch")
RUN = CATCH / "runs/Catch8/seed0"
RECIPE = CATCH / "recipes/Catch8/seed0.json"
CAMPAIGN = CATCH / "campaigns/0123456789abcdef"
LOG = CATCH / "logs/Catch8/seed0"


def _one(pattern: str) -> Path:
    (path,) = (ROOT / RUN).glob(pattern)
    return RUN / path.name


RECORD, WEIGHTS = _one("run-*.json"), _one("weights-*.safetensors")
PLAYED = _one("evaluation-*.parquet")
STATUS = {
    "fingerprint": json.loads((ROOT / RECORD).read_text())["fingerprint"], "state": "failed",
    "step": 3, "total_steps": 5, "steps_per_second": 1.5, "last_return": 1.0, "wall_seconds": 9.0,
    "updated": "2026-01-01T00:00:00+00:00", "message": "no", "permanent": True,
}  # fmt: skip
NOTE = {"sha256": "ab" * 32, "bytes": 5, "variant": "cpu"}


# --- the doors -----------------------------------------------------------------------------------


def _shown(text: str) -> None:
    """What people are told can be shown as it is."""
    assert shown(text) == text and len(text) <= LONGEST


def _on_console(*things: Any) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    for thing in things:
        console.print(thing)
    _shown(console.export_text()[:LONGEST])


def _status() -> None:
    _on_console(overview({CATCH: read_statuses(CATCH)}))


def _outlook() -> None:
    from datetime import UTC, datetime

    _on_console(show_outlook(read_outlook(CATCH), datetime(2026, 1, 1, tzinfo=UTC)))


def _verified() -> None:
    import torch

    verdict = verify(RECORD, torch.device("cpu"), play_again=False)
    assert verdict.finding in Finding
    _shown(verdict.line(RECORD))


def _reported() -> None:
    """Read all that a report says; what goes into its tables breaks none."""
    report = read_report(CATCH)
    rows = [row for row in _rows(report)]
    for row in rows:
        for value in row.values():
            assert not isinstance(value, str) or not set(value) & set("|`<>\"'&\n\r\t")
            assert not isinstance(value, str) or value[0] not in "=+-@"
    assert _csv(rows, _schema(report))


def _scored() -> None:
    for game, _, _ in read_returns(CATCH):
        _shown(game)
    _shown(read_partial(CATCH) or "")


def _evaluation_recipe() -> None:
    recipe, text = read_recipe_text(RECIPE)
    read_evaluation_recipe(run_files(RECIPE, recipe, text), of_earlier_code=True)


def _image() -> None:
    digest = running_digest()
    assert digest is None or len(digest) == 64


def _ledger() -> None:
    ledger = read_ledger()
    _shown(ledger.damage or "")
    for entries in ledger.sources:
        _shown("".join(entries)[:LONGEST])


def _curve() -> None:
    (run,) = (run for run in read_plan(CATCH).runs if run.seed == 0)
    for name in ("episodes.parquet", "training.parquet"):
        read_curve(run, name, ["episode_return", "loss/reward"])


@dataclass(frozen=True)
class Door:
    """A file, and what reads it."""

    file: Path
    enter: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.file.name}-{getattr(self.enter, '__name__', '')}".strip("-_")


def _record() -> None:
    run = read_record(RECORD)
    _shown(f"{run.record.device}{run.commit}{run.record.finished}{run.record.backend}")


DOORS = (
    Door(Path("config/config.yaml"), lambda: load_experiment(Path("config/config.yaml"))),
    Door(Path("config/presets/quick.yaml"), lambda: load_preset("quick")),
    Door(RECIPE, lambda: read_recipe(RECIPE)),
    Door(RECIPE, _status),
    Door(RECIPE.with_suffix(".evaluation.json"), _evaluation_recipe),
    Door(CATCH / "recipes/report.json", _status),
    Door(CATCH / "recipes/report.json", _reported),
    Door(RECORD, _record),
    Door(RECORD, _reported),
    Door(RECORD, _outlook),
    Door(RECORD, _verified),
    Door(RECORD, lambda: earlier_run(RUN, RECIPE)),
    Door(RUN / "evaluation.json", _status),
    Door(RUN / "evaluation.json", lambda: evaluations_of(read_record(RECORD))),
    Door(RUN / "episodes.parquet", _curve),
    Door(RUN / "training.parquet", _curve),
    Door(CATCH / "report/scores.parquet", _scored),
    Door(WEIGHTS, lambda: read_weights(WEIGHTS)),
    Door(LOG / f"train-{STATUS['fingerprint'][:16]}.log", _status),  # type: ignore[index]
    Door(CAMPAIGN / "campaign.json", lambda: read_campaign(CAMPAIGN)),
    Door(DVC_YAML, lambda: _shown(covered_results() or "")),
    Door(LOCK, _ledger),
    Door(LOCK, lambda: [*_out(RUN / "checkpoint.parquet", "train@Catch8-0")]),
    Door(lock_of(RUN), lambda: read_holder(RUN)),
    Door(PROCESSES, lambda: Repository.mend_processes(None)),  # type: ignore[arg-type]
    Door(Path("accepted.json"), lambda: fingerprints.accepted.__wrapped__()),
    Door(Path("baselines.csv"), lambda: read_baselines(Path("baselines.csv"))),
    Door(Path("image.json"), _image),
    Door(CITATION, read_citation),
    Door(PLAYED, lambda: evaluations_of(read_record(RECORD))),
    Door(PLAYED, _reported),
    Door(RUN / "status.json", _status),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a valid file at every door."""
    with valid_files(tmp_path_factory.mktemp("doors")) as root:
        yield root


@contextmanager
def valid_files(root: Path) -> Iterator[Path]:
    """Lay a valid file at every door, in a folder that is the current one for a while."""
    for name in ("config", "containers/run.lock", "CITATION.cff", str(CATCH)):
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    for seed in (1, 2):
        shutil.rmtree(root / CATCH / f"runs/Catch8/seed{seed}")
    texts = {
        RUN / "status.json": json.dumps(STATUS),
        LOG / f"train-{STATUS['fingerprint'][:16]}.log": "one\nlast\n",  # type: ignore[index]
        CAMPAIGN / "recipes/report.json": (ROOT / CATCH / "recipes/report.json").read_text(),
        CAMPAIGN / "campaign.json": json.dumps(
            {
                "format": 1,
                "device": "cpu",
                "backend": "auto",
                "image": None,
                "runs": [["Catch8", 0]],
            }
        ),
        DVC_YAML: f"vars:\n- results: {CATCH}\nstages: {{}}\n",
        LOCK: (
            "schema: '2.0'\nstages:\n  train@Catch8-0:\n    cmd: drama train\n    outs:\n"
            f"    - path: {RUN}/checkpoint.parquet\n      md5: {'ab' * 16}\n"
        ),
        lock_of(RUN): '{"host": "a", "process": 1, "since": "", "job": null, "cluster": null}',
        PROCESSES: json.dumps({"read": {"a": [{"pid": 1, "cmd": "x"}]}, "write": {}}),
        Path("accepted.json"): fingerprints.ACCEPTED.read_text(),
        Path("baselines.csv"): (ROOT / "drama/report/baselines.csv").read_text(),
        Path("image.json"): json.dumps(NOTE),
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    patch.setattr(fingerprints, "ACCEPTED", Path("accepted.json"))
    patch.setenv("APPTAINER_CONTAINER", "image.sif")
    yield root
    patch.undo()


# --- damage --------------------------------------------------------------------------------------

HOSTILE = (
    None, True, False, -1, 0, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", " ", ".",
    "../../etc/passwd", "/etc/passwd", "a/../../b", "\x1b[31mred", "\u202eback", "\ud800", "\x00",
    "=cmd()", "+1", "-rf", "@x", "$(touch pwned)", "`touch pwned`", "a|b", "<script>", "[red]x[/]",
    "[/]", "a\nb", "a,b", "x" * 100_000, "é" * 3000, [], {}, [[]], {"a": {"b": 1}}, [None] * 1000,
    "2026-01-01", "0" * 64, "run-0.json", "Catch16", "Pong",
)  # fmt: skip
DEEP = ("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000,
        "- " * 50_000, "a: " * 3000)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
TEXTS = (b"", b"\xff\xfe\x00", b"null", b"0", b'""', b"[]", b"{}", b"\xef\xbb\xbf{}", b"!!set {a}",
         b"!!python/object:os.system {}", b"a: !!bool maybe", b"--- 1\n--- 2", b"%YAML 9.9\n---\n",
         BOMB.encode(), *(deep.encode() for deep in DEEP))  # fmt: skip


PIECES = (b"\x00", b"\xff", b"\x1b[2J", b"'", b'"', b"&a ", b"*a ", b"<<: ", b"!!int ", b"1e999",
          b"9" * 5000, b"!!float " + b"1:" * 200, b": ", b"\n", b"{", b"]", b"- ",
          b"$(x)")  # fmt: skip


def _as_pipe(path: Path) -> None:
    os.mkfifo(path)


def _as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _as_loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = (_as_pipe, _as_device, _as_loop, Path.mkdir)


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data if isinstance(data, list) else ())
    )
    for key, value in items:
        yield from _places(value, (*place, key))


def _swapped(draw: st.DrawFn, data: Any) -> Any:
    """Put hostile values, names or nothing in a few places of what a JSON file says."""
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([p for p in _places(data) if p] or [(None,)]))
        if last is None:
            return deepcopy(draw(st.sampled_from(HOSTILE)))
        around = data
        for key in outer:
            around = around[key]
        how = draw(st.sampled_from(("value", "value", "value", "gone", "name")))
        if how == "value":
            around[last] = deepcopy(draw(st.sampled_from(HOSTILE)))
        elif isinstance(around, list):
            del around[last]
        else:
            value = around.pop(last)
            if how == "name":
                around[str(draw(st.sampled_from(HOSTILE)))] = value
    return data


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, cut, insert and repeat bytes."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1))
        how = draw(st.sampled_from(("flip", "cut", "insert", "repeat", "drop")))
        if how == "flip":
            flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif how == "cut":
            content = content[:place]
        elif how == "insert":
            piece = draw(st.sampled_from(PIECES))
            content = content[:place] + piece + content[place:]
        else:
            end = draw(st.integers(place, min(len(content), place + 64)))
            piece = content[place:end]
            content = content[:place] + (piece * 3 if how == "repeat" else b"") + content[end:]
    return content


def _parquet(draw: st.DrawFn, path: Path) -> None:
    """Change what a Parquet file's header, columns or rows say, and write it as a whole."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {})
    if b"drama" in metadata and draw(st.booleans()):
        header = _swapped(draw, json.loads(metadata[b"drama"]))
        metadata[b"drama"] = draw(st.sampled_from((
            json.dumps(header).encode(), b"\xff", b"", DEEP[0].encode())))  # fmt: skip
        table = table.replace_schema_metadata(metadata)
    else:
        rows = table.to_pylist()
        rows = _swapped(draw, rows) if rows else rows
        import pyarrow as pa

        try:
            table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        except (pa.ArrowException, AttributeError, TypeError, OverflowError, ValueError):
            table = table.slice(0, draw(st.integers(0, len(rows))))
    pq.write_table(table, path)


def _safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _swapped(draw, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _damage(draw: st.DrawFn, path: Path) -> None:
    """Change a file."""
    how = draw(st.sampled_from(("said", "said", "said", "bytes", "bytes", "text", "kind")))
    if how == "kind":
        path.unlink()
        draw(st.sampled_from(KINDS))(path)
        return
    content = path.read_bytes()
    if how == "text":
        path.write_bytes(draw(st.sampled_from(TEXTS)))
    elif how == "bytes" or path.suffix not in (".json", ".parquet", ".safetensors", ""):
        path.write_bytes(_bytes(draw, content))
    elif path.suffix == ".parquet":
        _parquet(draw, path)
    elif path.suffix == ".safetensors":
        path.write_bytes(_safetensors(draw, content))
    else:
        path.write_text(json.dumps(_swapped(draw, json.loads(content))))


@contextmanager
def _put_back(path: Path) -> Iterator[None]:
    kept = path.read_bytes()
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(kept)


@st.composite
def _damaged(draw: st.DrawFn, path: Path) -> None:
    _damage(draw, path)


def _enter(door: Door) -> None:
    """Read what lies at a door, as a command does; what it says is fit to be shown."""
    try:
        door.enter()
    except DramaError as error:
        assert str(error) and error.exit_code in (1, 2, 3)
        _shown(str(error))
    except OSError as error:  # for which the command has words, too
        assert error.errno is not None and reason(error)


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_a_valid_file_is_read(project: Path, door: Door) -> None:
    try:
        door.enter()
    except DramaError as error:
        assert "for other code" in str(error) or "no checkpoint" in str(error), error


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_whatever_lies_there_is_read_or_refused_in_words(project: Path, door: Door) -> None:
    damaging(door)()


def damaging(door: Door) -> Callable[[], None]:
    """Return Hypothesis's test of a door."""

    @settings(
        max_examples=CASES or 12,
        deadline=None,
        database=None,
        derandomize=not CASES,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def enter(data: st.DataObject) -> None:
        with _put_back(door.file):
            data.draw(_damaged(door.file))
            _enter(door)
        assert not Path("pwned").exists()

    return enter


@pytest.mark.whole
@pytest.mark.skipif(not find_spec("atheris"), reason="Atheris has no build for this system")
@pytest.mark.parametrize("door", DOORS if CASES else DOORS[:1], ids=str)
def test_guided_by_what_it_reaches_nothing_else_is_found(door: Door, tmp_path: Path) -> None:
    script = ROOT / "tests/faults/guided.py"
    done = subprocess.run(
        [sys.executable, script, str(DOORS.index(door)), tmp_path, f"-runs={CASES or 200}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Done {CASES or 200} runs" in done.stderr


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", DOORS, ids=str)
def test_what_is_no_file_is_refused_in_words(
    project: Path, door: Door, kind: Callable[[Path], None]
) -> None:
    with _put_back(door.file):
        door.file.unlink()
        kind(door.file)
        _enter(door)
