"""Recording whole runs in DVC: dvc.lock says what belongs to today's recipes, the cache holds it.

One process does it for all runs, because DVC's own locks let only one commit at a time, and know
processes of one machine only. A run is recorded when its run-<fingerprint>.json is there, which is
written last, when its fingerprint is today's, and when the bytes of every artifact are those that
the record names. How files get into the cache is DVC's own doing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from drama.errors import ConfigurationError, DramaError
from drama.files import remove_leftovers, write_text
from drama.pipeline.artifacts.evaluations import note_evaluation
from drama.pipeline.artifacts.integrity import NotRecorded, is_text_of, verify
from drama.pipeline.artifacts.lockfile import LOCK, Entries, Ledger, read_ledger, write_ledger
from drama.pipeline.artifacts.records import read_record
from drama.pipeline.artifacts.repository import PROCESSES, Repository
from drama.pipeline.artifacts.stages import (
    DVC_YAML,
    EXPERIMENT,
    IGNORED,
    covered_results,
    dvc_yaml,
    is_ignored,
    is_outside,
    remedy,
    results_folder,
)
from drama.pipeline.config import Experiment, load_experiment
from drama.pipeline.layers import few
from drama.pipeline.plans import Plan, PlannedRun
from drama.pipeline.recipes import evaluation_recipe, holds, plan
from drama.runs.folder import CHECKPOINT, REPLAY, RunBusy, locked


class NothingToRecord(DramaError):
    """Results that are not kept in DVC here."""

    exit_code = 0


@dataclass
class Recorded:
    """What a recording did.

    Attributes:
        stages: number of stages in dvc.lock.
        recorded: stages that were recorded just now.
        unfinished: runs that are not trained to their end.
        notes: what was repaired or left out, and why.
        problems: what went wrong; everything else is recorded all the same.
    """

    stages: int = 0
    recorded: list[str] = field(default_factory=list)
    unfinished: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for people."""
        missing = f"; {self.unfinished} not trained yet" if self.unfinished else ""
        new = f"{len(self.recorded)} recorded just now" if self.recorded else "nothing new"
        return f"{LOCK}: {self.stages} stages, {new}{missing}"


def record(results: Path | None = None) -> Recorded:
    """Record every whole run of today's plan, its evaluation and the report.

    Args:
        results: results/<preset>; other results than those dvc.yaml is about are left alone.

    Raises:
        NothingToRecord: without DVC or git, or for results that dvc.yaml is not about.
        ConfigurationError: when today's plan cannot be made, or there is no such folder.
        NotRecorded: when DVC itself is missing or cannot go on.
    """
    if results is not None and not results.is_dir():
        found = "a file" if results.exists() else "not found"
        raise ConfigurationError(f"{results}: {found}. Name a preset's results, such as results/xs")
    experiment = load_experiment(EXPERIMENT)
    _check_usable(results, experiment)
    planned = plan(EXPERIMENT, write=False)
    with Repository.open(wait=True) as repository:  # other recordings, and `dvc push`, come first
        recorder = _Recorder(experiment, planned, repository, read_ledger())
        recorder.record_all()
        return recorder.outcome


def record_plan() -> str | None:
    """Record the stage `plan` after `drama plan`, so that `dvc status` names what that changed.

    Returns:
        Why it could not be recorded; None when it is, or need not be.
    """
    if "DVC_STAGE" in os.environ:  # `dvc repro` gave the command, and records it itself
        return None
    experiment = load_experiment(EXPERIMENT)
    try:
        _check_usable(None, experiment)
        with Repository.open(wait=False) as repository:
            repository.mend_processes()
            ledger = read_ledger()
            if ledger.damage:
                return f"{LOCK}: {ledger.damage}; `drama record` repairs it"
            if repository.knows("plan") and not repository.is_recorded("plan", ledger.entries):
                write_ledger(ledger.entries | {"plan": repository.commit("plan")})
    except NothingToRecord:
        return None
    except NotRecorded as error:
        return str(error)
    return None


# --- what there is to record ---------------------------------------------------------------------


class _Recorder:
    """One recording: today's plan, DVC's repository, dvc.lock before and after, what to tell."""

    def __init__(
        self, experiment: Experiment, planned: Plan, repository: Repository, ledger: Ledger
    ) -> None:
        self.experiment, self.planned = experiment, planned
        self.repository, self.ledger = repository, ledger
        self.outcome = Recorded()
        self.entries: Entries = {}
        for entries in ledger.sources:
            self.entries = entries | self.entries
        self.before = dict(self.entries)

    def record_all(self) -> None:
        """Find what is to be recorded, record it, and replace dvc.yaml and dvc.lock with it."""
        if self.ledger.damage:
            self.outcome.notes.append(
                f"{LOCK}: {self.ledger.damage}; repaired from the runs' records"
            )
        if covered_results() is None:
            self.outcome.notes.append(f"{DVC_YAML}: missing or unreadable; written anew")
        if self.repository.mend_processes():
            self.outcome.notes.append(f"{PROCESSES}: left unreadable by a killed process; removed")
        self._drop_unknown()
        ready = [run for run in self.planned.runs if self._is_ready(run)]
        self._write_stages({*self.entries, *(stage for run in ready for stage in _stages(run))})
        for run in ready:
            with self._troubles():
                self._record_run(run)
        self._write_stages({*self.entries, "report"})  # it needs what is recorded by now
        if self.repository.knows("plan"):
            with self._troubles():
                self._record_report()
            with self._troubles():
                if all(is_text_of(run.recipe, run.fingerprint) for run in self.planned.runs):
                    self._commit_changed("plan")
        else:
            self.entries.clear()
        self._write_stages(self.entries)
        if self.entries != self.before or self.ledger.damage:
            write_ledger(self.entries)
        self.outcome.stages = len(self.entries)

    def _drop_unknown(self) -> None:
        """Drop what today's configuration has no place for, such as a game that was taken out."""
        todays = {"plan", "report"}
        for run in self.planned.runs:
            todays |= {f"train@{run.game}-{run.seed}", f"evaluate@{run.game}-{run.seed}"}
        place = f"{results_folder(self.experiment)}/"
        unknown = [
            stage
            for stage, entry in self.entries.items()
            if stage not in todays
            or not any(out["path"].startswith(place) for out in entry.get("outs") or ())
        ]
        for stage in unknown:
            del self.entries[stage]
        if unknown:
            self.outcome.notes.append(
                f"{LOCK}: dropped {few(unknown)}, which {EXPERIMENT} does not ask for any more. "
                "Their files stay where they are; an earlier commit's dvc.lock names them"
            )

    def _write_stages(self, stages: Collection[str]) -> None:
        """Have dvc.yaml hold these stages and no others."""
        text = dvc_yaml(self.experiment, stages)
        if not holds(DVC_YAML, text):
            write_text(DVC_YAML, text)
            self.repository.read_stages()

    def _is_ready(self, run: PlannedRun) -> bool:
        """Say whether a run is whole and its recipe on disk is today's."""
        if not run.record.exists():
            self.outcome.unfinished += 1
            return False
        if not is_text_of(run.recipe, run.fingerprint):
            self.outcome.notes.append(
                f"{run.recipe}: not today's recipe, so its run is left out; `drama plan` writes it"
            )
            return False
        return True

    def _record_run(self, run: PlannedRun) -> None:
        """Record a run, held to its own record first, and its evaluation when that is today's."""
        if not self._is_recorded(run):
            with locked(run.folder, wait=False):
                remove_leftovers(run.folder)
                self.outcome.notes += verify(read_record(run.record), self.repository.cache)
                self._commit(f"train@{run.game}-{run.seed}")
        recipe, stage = evaluation_recipe(run.recipe), f"evaluate@{run.game}-{run.seed}"
        if run.evaluation.exists() and is_text_of(recipe, run.evaluation_fingerprint):
            note_evaluation(run.evaluation)
            self._commit_changed(stage)
        elif not run.evaluation.exists() and self.entries.pop(stage, {}):
            self.outcome.notes.append(
                f"{LOCK}: dropped {stage}, which was of an earlier run; "
                f"`drama evaluate {run.recipe}` scores this one"
            )

    def _is_recorded(self, run: PlannedRun) -> bool:
        """Say whether dvc.lock, or an older one, already holds this very run."""
        stage = f"train@{run.game}-{run.seed}"
        here = all((run.folder / name).exists() for name in (CHECKPOINT, REPLAY))
        for entries in (self.entries, *(() if here else self.ledger.older)):
            if self.repository.is_recorded(stage, entries):
                self.entries[stage] = entries[stage]
                return True
        return False

    def _commit_changed(self, stage: str) -> None:
        if not self.repository.is_recorded(stage, self.entries):
            self._commit(stage)

    def _commit(self, stage: str) -> None:
        self.entries[stage] = self.repository.commit(stage)
        self.outcome.recorded.append(stage)

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        """Note what cannot be recorded, and go on with the rest."""
        try:
            yield
        except RunBusy as error:
            self.outcome.notes.append(f"{error}; left out")
        except DramaError as error:
            self.outcome.problems.append(str(error))

    def _record_report(self) -> None:
        """Record the report when it is today's."""
        plan_file = self.planned.results / "recipes" / "report.json"
        todays = self.planned.report.exists() and is_text_of(plan_file, self.planned.fingerprint)
        if todays and self.repository.is_there("report"):
            self._commit_changed("report")


def _stages(run: PlannedRun) -> list[str]:
    """Return a run's stages, those that there is something for."""
    names = ["train", "evaluate"] if run.evaluation.exists() else ["train"]
    return [f"{name}@{run.game}-{run.seed}" for name in names]


def _check_usable(results: Path | None, experiment: Experiment) -> None:
    """Raise NothingToRecord where nothing is to be recorded."""
    if not Path(".dvc/config").is_file():
        raise NothingToRecord("nothing recorded: DVC is not set up here (no .dvc/config)")
    if not any((place / ".git").exists() for place in (Path.cwd(), *Path.cwd().parents)):
        raise NothingToRecord("nothing recorded: DVC needs a git repository, and this is none")
    wanted = results_folder(experiment) if results is None else os.path.normpath(results)
    covered = covered_results() or results_folder(experiment)
    if is_outside(covered):
        raise NotRecorded(f"{DVC_YAML}: {covered}: {remedy(covered)}, then `drama stages`")
    if is_outside(wanted):
        raise NothingToRecord(f"{wanted}: not recorded. {remedy(wanted)}")
    if is_ignored(wanted):
        raise NothingToRecord(f"{wanted}: not recorded; {IGNORED}")
    if wanted != covered:
        raise NothingToRecord(f"{wanted}: not recorded; DVC keeps {covered} (dvc.yaml)")
    if find_spec("dvc") is None:
        raise NotRecorded("nothing recorded: DVC is not installed here; `make setup`")
