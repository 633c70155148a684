"""Recording whole runs in DVC: dvc.lock says what belongs to today's recipes, the cache holds it.

One process does it for all runs, because DVC's own locks let only one commit at a time, and know
processes of one machine only. A run is recorded when its run-<fingerprint>.json is there, which is
written last, when its fingerprint is today's, and when the bytes of every artifact are those that
the record names. What is recorded already costs a look at small files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from drama.errors import ConfigurationError, DramaError, reason
from drama.files import remove_leftovers
from drama.pipeline.artifacts.entries import (
    NotRecorded,
    file_item,
    holds,
    is_kept,
    is_text_of,
    names_all,
    verify,
)
from drama.pipeline.artifacts.evaluations import NOTE, EvaluationDamaged, note_evaluation
from drama.pipeline.artifacts.lockfile import (
    LOCK,
    Entries,
    Entry,
    Ledger,
    read_ledger,
    write_ledger,
)
from drama.pipeline.artifacts.repository import PROCESSES, Repository, alone, mend_processes
from drama.pipeline.artifacts.stages import (
    DVC_YAML,
    EXPERIMENT,
    Stage,
    dvc_yaml,
    evaluate_stage,
    plan_stage,
    report_stage,
    results_folder,
    train_stage,
)
from drama.pipeline.config import Experiment, load_experiment
from drama.pipeline.plans import Plan, PlannedRun
from drama.pipeline.recipes import plan
from drama.runs.folder import RunBusy, locked


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
        results: results/<preset>; other results than those dvc.yaml covers are left alone.

    Raises:
        NothingToRecord: without dvc.yaml or git, or for results that dvc.yaml does not cover.
        ConfigurationError: when today's plan cannot be made, or there is no such folder.
        NotRecorded: when DVC itself is missing or cannot go on.
    """
    if results is not None and not results.is_dir():
        found = "a file" if results.exists() else "not found"
        raise ConfigurationError(f"{results}: {found}. Name a preset's results, such as results/xs")
    experiment = load_experiment(EXPERIMENT)
    _check_usable(results, experiment)
    planned = plan(EXPERIMENT, write=False)
    with alone():
        recorder = _Recorder(experiment, planned, read_ledger())
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
        stage = plan_stage(experiment, results_folder(experiment))
        with alone(), Repository.open() as repository:
            mend_processes()
            ledger = read_ledger()
            if ledger.damage:
                return f"{LOCK}: {ledger.damage}; `drama record` repairs it"
            write_ledger(ledger.entries | {stage.name: repository.commit(stage)})
    except NothingToRecord:
        return None
    except NotRecorded as error:
        return str(error)
    return None


# --- what there is to record ---------------------------------------------------------------------


class _Recorder:
    """One recording: today's plan, dvc.lock's entries before and after, and what to tell."""

    def __init__(self, experiment: Experiment, planned: Plan, ledger: Ledger) -> None:
        self.experiment, self.planned, self.ledger = experiment, planned, ledger
        self.results = planned.results.as_posix()
        self.outcome = Recorded()
        self.entries: Entries = {}
        for entries in (ledger.entries, *(ledger.older if ledger.damage else ())):
            self.entries = entries | self.entries
        self.before = dict(self.entries)

    def record_all(self) -> None:
        """Find what is to be recorded, record it, and replace dvc.lock when anything changed."""
        if self.ledger.damage:
            self.outcome.notes.append(
                f"{LOCK}: {self.ledger.damage}; repaired from the runs' records"
            )
        if mend_processes():
            self.outcome.notes.append(f"{PROCESSES}: left unreadable by a killed process; removed")
        runs = [run for run in self._covered() if self._is_ready(run)]
        to_commit = [run for run in runs if not self._is_recorded(run)]
        if to_commit:
            self._commit_runs(to_commit)
        for run in runs:
            self._note_evaluation(run)
        self._report_and_plan()
        self.outcome.stages = len(self.entries)
        if self.entries != self.before or self.ledger.damage:
            self._write()

    def _write(self) -> None:
        """Write what changed into dvc.lock, over what `dvc repro` may have written meanwhile."""
        changed = {n: entry for n, entry in self.entries.items() if self.before.get(n) != entry}
        with Repository.open():
            now = read_ledger()
            write_ledger((self.entries if now.damage else now.entries) | changed)

    def _covered(self) -> list[PlannedRun]:
        """Today's runs that dvc.yaml has stages for."""
        text = DVC_YAML.read_text(encoding="utf-8")
        if text == dvc_yaml(self.experiment):
            return list(self.planned.runs)
        self.outcome.problems.append(
            f"{DVC_YAML} does not hold what {EXPERIMENT} asks for: `drama stages` writes it anew, "
            "and `drama record` then records the rest"
        )
        matrix = _dvc_stages()["train"]["matrix"]
        return [
            run
            for run in self.planned.runs
            if run.game in matrix["game"] and run.seed in matrix["seed"]
        ]

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

    def _stages(self, run: PlannedRun) -> tuple[Stage, Stage]:
        return (
            train_stage(self.results, run.game, run.seed),
            evaluate_stage(self.results, run.game, run.seed),
        )

    def _is_recorded(self, run: PlannedRun) -> bool:
        """Say whether dvc.lock, or an older one, already holds this very run."""
        stage, _ = self._stages(run)
        for entries in (self.entries, *self._older(stage)):
            entry = entries.get(stage.name)
            if entry is not None and holds(stage, entry) and is_kept(stage, entry):
                self.entries[stage.name] = entry
                return True
        return False

    def _older(self, stage: Stage) -> Iterator[Entries]:
        if not all(Path(blob).exists() for blob in stage.blobs):
            yield from self.ledger.older

    def _commit_runs(self, runs: Iterable[PlannedRun]) -> None:
        """Verify runs against their records and put them into DVC's cache."""
        with Repository.open() as repository:
            for run in runs:
                stage, _ = self._stages(run)
                try:
                    with locked(run.folder, wait=False):
                        remove_leftovers(run.folder)
                        self.outcome.notes += verify(run, stage)
                        self.entries[stage.name] = repository.commit(stage)
                except RunBusy as error:
                    self.outcome.notes.append(f"{error}; left out")
                except DramaError as error:
                    self.outcome.problems.append(str(error))
                else:
                    self.outcome.recorded.append(stage.name)

    def _note_evaluation(self, run: PlannedRun) -> None:
        """Record a run's evaluation, when the run is recorded and the evaluation is today's."""
        training, stage = self._stages(run)
        trained = self.entries.get(training.name)
        recipe = Path(stage.needs[0])
        if trained is None or not holds(training, trained) or not run.evaluation.exists():
            return
        if not is_text_of(recipe, run.evaluation_fingerprint):
            return
        try:
            note_evaluation(run.evaluation, run.evaluation_fingerprint)
        except EvaluationDamaged as error:
            self.outcome.problems.append(str(error))
            return
        entry: Entry = {
            "cmd": stage.command,
            "deps": [file_item(Path(path)) for path in stage.needs],
            "outs": [file_item(run.folder / NOTE)],
        }
        if self.entries.get(stage.name) != entry:
            self.entries[stage.name] = entry
            self.outcome.recorded.append(stage.name)

    def _report_and_plan(self) -> None:
        """Record the report when it is today's, and the plan beside anything else."""
        stages = []
        report = report_stage(self.experiment, self.results)
        planning = plan_stage(self.experiment, self.results)
        known = self.entries.get(report.name)
        if self._report_is_ready(report) and not (known and holds(report, known)):
            stages.append(report)
        known = self.entries.get(planning.name)
        stale = stages or self.outcome.recorded or not (known and names_all(planning, known))
        if stale and self._plan_is_ready():
            stages.append(planning)
        if not stages:
            return
        with Repository.open() as repository:
            for stage in stages:
                entry = repository.commit(stage)
                if self.entries.get(stage.name) != entry:
                    self.entries[stage.name] = entry
                    self.outcome.recorded.append(stage.name)

    def _report_is_ready(self, report: Stage) -> bool:
        present = all(Path(path).exists() for path in (*report.needs, *report.outs))
        fingerprint = self.planned.report.stem.removeprefix("report-")
        text = Path(report.needs[0])
        return present and self.planned.report.exists() and is_text_of(text, fingerprint)

    def _plan_is_ready(self) -> bool:
        return all(is_text_of(run.recipe, run.fingerprint) for run in self.planned.runs)


def _check_usable(results: Path | None, experiment: Experiment) -> None:
    """Raise NothingToRecord where nothing is to be recorded."""
    if not Path(".dvc/config").is_file() or not DVC_YAML.is_file():
        raise NothingToRecord("nothing recorded: DVC is not set up here (no .dvc/config, dvc.yaml)")
    if not any((place / ".git").exists() for place in (Path.cwd(), *Path.cwd().parents)):
        raise NothingToRecord("nothing recorded: DVC needs a git repository, and this is none")
    covered = _dvc_stages()["report"]["cmd"].split()[-1]
    wanted = Path(results_folder(experiment)) if results is None else results
    if os.path.normpath(wanted) != covered:
        raise NothingToRecord(f"{wanted}: not recorded; DVC keeps {covered} (dvc.yaml)")
    if find_spec("dvc") is None:
        raise NotRecorded("nothing recorded: DVC is not installed here; `make setup`")


def _dvc_stages() -> dict[str, Any]:
    """Return what dvc.yaml says of its four stages."""
    try:
        stages: dict[str, Any] = yaml.safe_load(DVC_YAML.read_text(encoding="utf-8"))["stages"]
        if stages["report"]["cmd"].split() and stages["train"]["matrix"].keys() == {"game", "seed"}:
            return stages
        problem = "not the matrix of runs that it should be"
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = reason(error)
    raise NotRecorded(f"{DVC_YAML}: unreadable ({problem}); `drama stages` writes it anew")
