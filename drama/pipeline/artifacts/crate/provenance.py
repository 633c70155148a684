"""What a crate says: how every file of a campaign came about.

The profile is Provenance Run Crate 0.5 (https://w3id.org/ro/wfrun/provenance/0.5): besides the
workflow's own, every training and every evaluation is an action, with what it was made from and
what came of it. All of it stands in the runs' records and evaluations; nothing here looks at a
clock or at git, so the same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from drama import __version__
from drama.agent.settings import Count, Fingerprint
from drama.errors import reason
from drama.files import sha256_file, write_json, write_text
from drama.pipeline.artifacts.crate.citation import CITATION, Author, read_citation
from drama.pipeline.artifacts.crate.croissant import CONFORMS_TO, KINDS, croissant
from drama.pipeline.artifacts.crate.graph import Graph
from drama.pipeline.artifacts.crate.runs import CratedRun
from drama.pipeline.artifacts.evaluations import NOTE, Evaluation
from drama.pipeline.artifacts.integrity import is_text_of
from drama.pipeline.artifacts.records import Artifact, Damaged
from drama.pipeline.artifacts.status import plural
from drama.pipeline.layers import few
from drama.pipeline.plans import PLAN, RECIPES, Plan, PlannedRun
from drama.reading import read_model
from drama.runs.folder import CHECKPOINT, REPLAY, SHORT

if TYPE_CHECKING:
    from rocrate.model.entity import Entity

WORKFLOW, RULES, LICENSE = Path("Snakefile"), Path("workflow/rules"), Path("LICENSE")
METADATA, CROISSANT, README = "ro-crate-metadata.json", "croissant.json", "README.md"
MADE_BY = "Written by `drama crate`"
"""How the description of a crate's metadata begins: what tells it from a stranger's."""

STEPS = {
    "train": "Train one run: a game and a seed",
    "evaluate": "Score one run over its evaluation episodes",
    "report": "Compare scores with people, random play and published methods",
}
"""The steps of the workflow, in their order; each is a rule and a command of `drama`."""

BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"

PAGE = f"""\
# {{name}}

{{description}}

| place | what |
|---|---|
| `report/index.html`, `report/report.md` | scores and figures |
| `runs/<Game>/seed<k>/` | what a run left: its record `run-*.json`, episodes, curves, evaluation |
| `recipes/` | what was planned: every setting of every run |
| `Snakefile`, `workflow/` | the workflow that made it |
| `{METADATA}` | how each file came about: a Provenance Run Crate (RO-Crate 1.1) |
| `{CROISSANT}` | what the tables hold, for loaders of data sets (Croissant 1.0) |

All tables are Parquet. Files that the metadata names with a `#` in front are not in this folder;
put at the place behind the `#`, `drama verify` holds them to their checksums.
"""


REPORT_FILES = (
    r"^(index\.html|report\.md|scores\.(csv|parquet)|(aggregates|metrics)\.json"
    r"|figures/[A-Za-z0-9-]{1,110}\.svg)$"
)


class _Shown(BaseModel):
    done: Count
    planned: Count


class _File(BaseModel):
    """A file that a report is made of."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: Annotated[str, Field(pattern=REPORT_FILES)]
    sha256: Fingerprint


class _Report(BaseModel):
    """What a report's stamp says: which files it has, and how many runs they show, if not all."""

    model_config = ConfigDict(frozen=True, strict=True)

    files: Annotated[tuple[_File, ...], Field(max_length=10_000)]
    runs: _Shown | None = None


class Provenance:
    """Puts one crate together.

    Attributes:
        graph: what is in it.
        absent: the large files that it describes and does not hold.
        at_hand: whether any of these is here all the same.
        report_note: what to know about the report in it, or why there is none.
    """

    def __init__(self, plan: Plan, runs: list[CratedRun], with_large: bool) -> None:
        self.plan, self.runs, self.with_large = plan, runs, with_large
        self.graph = Graph()
        self.absent: list[Artifact] = []
        self.at_hand = False
        self.report_note = ""
        here = {run.planned for run in runs}
        self.missing = [run for run in plan.runs if run not in here]
        self.citation = read_citation()
        self.ended = max(run.finished for run in runs)

    @property
    def summary(self) -> str:
        """Which of the planned runs there are, such as "37 of 130 runs, 2 of them not scored"."""
        planned = plural(len(self.plan.runs), "run")
        parts = [f"{len(self.runs)} of {planned}" if self.missing else planned]
        for number, what in (
            (sum(not run.evaluations for run in self.runs), "not scored"),
            (sum(not run.current for run in self.runs), "by earlier code"),
        ):
            parts += [f"{number} of them {what}"] if number else []
        return ", ".join(parts)

    @property
    def description(self) -> str:
        """The crate for people."""
        text = (
            "Results of Drama, a Mamba-2 world-model agent for Atari100k, under preset "
            f"{self.plan.preset}: {self.summary}."
        )
        if self.missing:
            text += f" Planned and not trained: {few([_title(run) for run in self.missing])}."
        if not self.plan.complete_protocol:
            text += " This is not the whole Atari100k protocol: no reproduction of the paper."
        return text

    def write(self, folder: Path) -> None:
        """Write the crate into an empty folder.

        Raises:
            Damaged: when a file is not what the run or the report recorded.
        """
        recipes = self._plan()
        scored = [file for run in self.runs for file in self._run(run)]
        report = self._report(scored)
        self._workflow(recipes, report)
        self._root()
        name, root = str(self.graph.root["name"]), self.graph.root
        write_text(folder / README, PAGE.format(name=name, description=fill(self.description, 100)))
        self.graph.file(folder / README, README, about=root, description="Where what is")
        write_json(folder / CROISSANT, self._croissant())
        self.graph.file(
            folder / CROISSANT, CROISSANT, conformsTo={"@id": CONFORMS_TO},
            description="The tables of all runs, for loaders of data sets: Croissant 1.0",
        )  # fmt: skip
        self.graph.write(folder)

    # --- the whole -------------------------------------------------------------------------------

    def _root(self) -> None:
        graph, cited = self.graph, self.citation
        graph.crate.metadata["description"] = f"{MADE_BY}, version {__version__}"
        graph.describe(
            graph.root,
            name=f"Drama, preset {self.plan.preset}: {self.summary}",
            description=self.description,
            datePublished=self.ended.isoformat(),
            license=graph.entity(cited.license_url, "CreativeWork", name=cited.license),
            author=self._authors(cited.authors),
            keywords="reinforcement learning, world model, Mamba-2, Atari100k",
            citation=cited.paper and graph.entity(
                cited.paper.url, "ScholarlyArticle", name=cited.paper.title,
                author=self._authors(cited.paper.authors), datePublished=str(cited.paper.year),
            ),
        )  # fmt: skip
        for path in (LICENSE, CITATION):
            if path.is_file():
                graph.file(path, path.name)

    def _authors(self, authors: tuple[Author, ...]) -> list[Entity]:
        return [self.graph.entity(f"#{author}", author.kind, name=f"{author}")
                for author in authors]  # fmt: skip

    def _plan(self) -> list[Entity]:
        """Add plan and recipes, of the missing runs as well: they say what was to be made."""
        plan = self.plan.results / RECIPES / PLAN
        files = [self.graph.file(plan, f"{RECIPES}/{PLAN}", description="Which runs are planned")]
        for run in self.plan.runs:
            for path, text in (
                (run.recipe, "Recipe: all that defines the run"),
                (_evaluation_recipe(run), "How the run is scored"),
            ):
                if path.is_file():
                    name = f"{RECIPES}/{run.game}/{path.name}"
                    text = f"{text}. {_title(run)}"
                    files.append(self.graph.file(path, name, description=text))
        return files

    def _tool(self, command: str, commit: str = "") -> Entity:
        version = f"commit {commit}" if commit else None
        return self.graph.entity(
            f"#drama-{command}" + f"@{commit}" * bool(commit), "SoftwareApplication",
            name=f"drama {command}", description=STEPS[command], softwareVersion=version,
        )  # fmt: skip

    def _workflow(self, recipes: list[Entity], report: list[Entity]) -> None:
        graph = self.graph
        tools = graph.crate.get_by_type("SoftwareApplication")  # those that something was made with
        steps = [
            graph.entity(
                f"#step-{name}", "HowToStep", name=name, position=str(position),
                description=text, workExample=used,
            )
            for position, (name, text) in enumerate(STEPS.items(), 1)
            if (used := [tool for tool in tools if tool["name"] == f"drama {name}"])
        ]  # fmt: skip
        workflow = graph.workflow(
            WORKFLOW, WORKFLOW.name, version=__version__, step=steps, hasPart=tools,
            conformsTo={"@id": BIOSCHEMAS},
            description="From configuration to score report, as it was when the crate was written; "
            "each training names the commit that it was made at",
        )  # fmt: skip
        for path in sorted(RULES.glob("*.smk")):
            text = f"Rules of the workflow: {path.stem}"
            graph.file(path, path.as_posix(), description=text, isPartOf=workflow)
        records = [graph.known(run.place(run.made.path.name)) for run in self.runs]
        graph.action(
            "campaign", workflow, name=f"The campaign: {self.summary}",
            description=self.description, object=recipes, result=[*records, *report],
            endTime=self.ended.isoformat(),
        )  # fmt: skip

    # --- a run -----------------------------------------------------------------------------------

    def _run(self, run: CratedRun) -> list[Entity]:
        """Add a run; returns its evaluations."""
        made, record = run.made, run.made.record
        files = {item.path: self._artifact(run, item) for item in record.artifacts}
        note = self._beside(run, made.path, "The run's record: recipe, checksums, versions")
        beside = {
            made.weights: "The agent alone, by drama export",
            made.weights.with_suffix(".md"): "Card of the agent's weights",
        }
        weights = [self._beside(run, path, text) for path, text in beside.items() if path.is_file()]
        seconds = self.graph.entity(
            f"#seconds-{run.name}", "PropertyValue", name="wall time",
            propertyID="https://schema.org/totalTime", value=f"{record.wall_seconds:.1f}",
            unitCode="https://qudt.org/vocab/unit/SEC",
        )  # fmt: skip
        time = timedelta(seconds=round(record.wall_seconds))
        by = "" if run.current else f", by earlier code (commit {made.commit})"
        self.graph.action(
            f"train-{run.name}", self._tool("train", made.commit),
            name=f"Training {_title(run.planned)}{by}",
            description=f"{record.steps} agent steps on {record.device} in {time} h, all sittings "
            "together",
            object=self._recipe(run), result=[note, *files.values(), *weights],
            endTime=run.finished.isoformat(), resourceUsage=seconds,
            environment=self.graph.values(
                {"device": record.device, "backend": record.backend, **record.versions}
            ),
            containerImage=record.image and self.graph.image(record.image),
        )  # fmt: skip
        if run.evaluations and (made.folder / NOTE).is_file():
            self._beside(run, made.folder / NOTE, "Which evaluation is the score, its checksum")
        return [
            self._evaluation(run, evaluation, [note, files[CHECKPOINT]])
            for evaluation in run.evaluations
        ]

    def _evaluation(self, run: CratedRun, evaluation: Evaluation, played: list[Entity]) -> Entity:
        short, recipe = evaluation.fingerprint[:SHORT], _evaluation_recipe(run.planned)
        scores = "; ".join(str(way) for way in evaluation.played.values())
        file = self._beside(run, run.made.folder / f"evaluation-{short}.parquet", scores)
        if is_text_of(recipe, evaluation.fingerprint):
            played.append(self.graph.known(f"{RECIPES}/{run.planned.game}/{recipe.name}"))
        self.graph.action(
            f"evaluate-{run.name}-{short}", self._tool("evaluate"),
            name=f"Evaluating {_title(run.planned)}", description=scores, object=played,
            result=file,
            environment=self.graph.values(
                {"device": evaluation.device, "backend": evaluation.backend}
            ),
        )  # fmt: skip
        return file

    def _recipe(self, run: CratedRun) -> Entity:
        """Return the recipe's file; where that is another one by now, what the record holds."""
        recipe = run.planned.recipe
        if is_text_of(recipe, run.made.fingerprint):
            return self.graph.known(f"{RECIPES}/{run.planned.game}/{recipe.name}")
        return self.graph.entity(
            f"#recipe-{run.made.fingerprint}", "CreativeWork",
            name=f"Recipe of {_title(run.planned)}", sha256=run.made.fingerprint,
            description=f"Stands in {run.place(run.made.path.name)}, under recipe",
        )  # fmt: skip

    def _beside(self, run: CratedRun, path: Path, text: str) -> Entity:
        return self.graph.file(path, run.place(path.name), description=text)

    def _artifact(self, run: CratedRun, item: Artifact) -> Entity:
        """Add a file that the run recorded, held to its checksum, or say that it is not there."""
        path, name = run.made.folder / item.path, run.place(item.path)
        large = item.path.startswith((CHECKPOINT, f"{REPLAY}/"))
        if large and not (self.with_large and path.is_file()):
            self.absent.append(item)
            self.at_hand |= path.is_file()
            return self.graph.absent(name, item)
        remedy = run.made.remedy if large else "`git checkout`"
        if not path.is_file():
            raise Damaged(f"{path}: not here, so no crate is written; {remedy} brings it back")
        if path.stat().st_size != item.bytes or sha256_file(path) != item.sha256:
            raise Damaged(
                f"{path}: not the bytes that {run.made.path.name} recorded, so no crate is "
                f"written; remove it, then {remedy}"
            )
        return self.graph.file(path, name)

    # --- the report and the tables ---------------------------------------------------------------

    def _report(self, scored: list[Entity]) -> list[Entity]:
        """Add the report, if there is one of this plan; returns its files."""
        folder, command = self.plan.results / "report", f"`drama report {self.plan.results}`"
        stamps = sorted(folder.glob(f"{self.plan.report.stem}*.json"))
        if not stamps:
            self.report_note = f"No report of this plan is in it; {command} writes one"
            return []
        try:
            stamp = read_model(stamps[0], _Report)
        except (OSError, ValueError) as error:  # ValidationError is one
            raise Damaged(f"{stamps[0]}: {reason(error)}; {command} writes it anew") from None
        for item in stamp.files:
            if not is_text_of(folder / item.path, item.sha256):
                raise Damaged(f"{folder / item.path}: not as written; {command} writes it anew")
        if stamp.runs:
            shown = f"{stamp.runs.done} of {plural(stamp.runs.planned, 'run')}"
            self.report_note = f"The report in it shows {shown}"
        names = [stamps[0].name, *(item.path for item in stamp.files)]
        files = [self.graph.file(folder / name, f"report/{name}") for name in names]
        self.graph.action(
            "report", self._tool("report"), name="Reporting",
            description=". ".join(filter(None, (STEPS["report"], self.report_note))),
            object=[self.graph.known(f"{RECIPES}/{PLAN}"), *scored], result=files,
        )  # fmt: skip
        return files

    def _croissant(self) -> dict[str, Any]:
        cited = self.citation
        about = {
            "name": f"drama-{self.plan.preset}",
            "description": self.description,
            "license": cited.license_url,
            "datePublished": self.ended.date().isoformat(),
            "version": __version__,
            "creator": [{"@type": f"sc:{by.kind}", "name": str(by)} for by in cited.authors],
            "citeAs": cited.paper and cited.paper.bibtex,
        }
        sizes = {run.made.recipe.settings.environment.image_size for run in self.runs}
        known = {name: value for name, value in about.items() if value}
        return croissant(known, dict(self._kinds()), sizes)

    def _kinds(self) -> Iterator[tuple[str, str]]:
        """Yield the kinds of tables there are, and what is to be said of their files."""
        runs = plural(len(self.runs), "run")
        absent = sum(item.path.startswith(f"{REPLAY}/") for item in self.absent)
        where = (
            f". {plural(absent, 'file')} of them are not in this folder: {METADATA} and the runs' "
            "records say their places, sizes and checksums"
        )
        for kind in KINDS:
            if kind != "evaluation" or any(run.evaluations for run in self.runs):
                yield kind, f"Of {runs}" + (where if kind == "replay" and absent else "")


def _evaluation_recipe(run: PlannedRun) -> Path:
    return run.recipe.with_suffix(".evaluation.json")


def _title(run: PlannedRun) -> str:
    return f"{run.game} seed {run.seed}"
