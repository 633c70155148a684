"""What becomes of Slurm jobs when Slurm does not answer or forgets: without Slurm.

tests/cluster/test_faults.py has the same on a real one.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

snakemake_executor = pytest.importorskip("snakemake_executor_plugin_slurm")

from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo  # noqa: E402

from drama.pipeline import slurm  # noqa: E402

TIMED_OUT = (
    "SLURM sbatch failed. The error message was 'sbatch: error: Batch job submission failed: "
    "Socket timed out on send/recv operation'.\n    sbatch call:\n        sbatch --parsable"
)
WRONG = (
    "SLURM sbatch failed. The error message was 'invalid partition specified: gpus'.\n"
    "    sbatch call:\n        sbatch --comment 'Connection refused'"
)


class Job:
    """A training job as far as the executor looks at it."""

    def __init__(self, folder: Path) -> None:
        self.name, self.wildcards = "train", ["Pong", "0", "abc"]
        self.wildcards_dict = {"game": "Pong", "seed": "0", "fingerprint": "abc"}
        self.output = [str(folder / "run-abc.json")]
        self.attempt, self.restart_times = 1, 5

    def is_group(self) -> bool:
        return False

    def status(self, **said: object) -> None:
        of_the_run = {"fingerprint": "a" * 64, "state": "failed", "step": 1, "total_steps": 2}
        Path(self.output[0]).with_name("status.json").write_text(json.dumps(of_the_run | said))


class Cluster:
    """An executor whose plugin's submissions end as they are told to; what is reported is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.answers: list[str | None] = []
        self.submissions = 0
        self.reported: list[tuple[str, str]] = []
        self.states: dict[str, str] | None = {}
        self.queue: list[tuple[str, slurm.QueuedJob]] = []
        executor: Any = slurm.Executor.__new__(slurm.Executor)
        executor.logger = SimpleNamespace(info=lambda text: None, warning=lambda text: None)
        executor.workflow = SimpleNamespace(
            workdir_init=str(folder),
            executor_settings=SimpleNamespace(
                keep_successful_logs=False, init_seconds_before_status_checks=40
            ),
            execution_settings=SimpleNamespace(latency_wait=60),
        )
        executor.slurm_logdir = folder / "logs"
        executor._names, executor._left, executor._behind = set(), {}, {}
        executor._refused, executor._said, executor._unlisted = {}, {}, {}
        executor._ending, executor.status_rate_limiter = threading.Event(), asyncio.Lock()
        executor._report_job_submission_threadsafe = lambda info: self.reported.append(
            ("submitted", str(info.external_jobid))
        )
        executor.report_job_success = lambda info: self.reported.append(("success", ""))
        self.executor = executor

        def submit(executor: Any, job: Job) -> None:
            self.submissions += 1
            answer = self.answers.pop(0)
            if answer:
                executor._report_job_error_threadsafe(SubmittedJobInfo(job), answer)
            else:
                executor._report_job_submission_threadsafe(SubmittedJobInfo(job, "7"))

        async def ask(command: str, logger: object) -> tuple[dict[str, str] | None, float]:
            return self.states, 0.1

        plugin = slurm.SlurmExecutor
        monkeypatch.setattr(slurm, "PAUSES", (0.0, 0.0, 0.0))
        monkeypatch.setattr(slurm, "_queue", lambda place: self.queue)
        monkeypatch.setattr(slurm, "query_job_status", ask)
        monkeypatch.setattr(plugin, "run_job", submit)
        monkeypatch.setattr(
            plugin, "_report_job_error_threadsafe",
            lambda executor, info, msg: executor.report_job_error(info, msg),
        )  # fmt: skip
        monkeypatch.setattr(
            plugin, "report_job_error",
            lambda executor, info, msg=None, **more: self.reported.append(("error", msg)),
        )  # fmt: skip

    def check(self, *infos: SubmittedJobInfo) -> list[SubmittedJobInfo]:
        """Ask once for states; returns the jobs that are not over."""

        async def every() -> list[SubmittedJobInfo]:
            return [info async for info in self.executor.check_active_jobs(infos)]

        return asyncio.run(every())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    return Cluster(monkeypatch, tmp_path)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([None], "submitted"),
        ([TIMED_OUT, TIMED_OUT, None], "submitted"),
        ([TIMED_OUT] * 4, "error"),
        ([TIMED_OUT, WRONG], "error"),
        ([WRONG], "error"),
    ],
)
def test_what_may_pass_is_tried_again_and_all_else_counts_at_once(
    cluster: Cluster, job: Job, answers: list[str | None], expected: str
) -> None:
    cluster.answers = [*answers]
    cluster.executor.run_job(job)
    assert not cluster.answers and cluster.submissions == len(answers)
    assert [what for what, _ in cluster.reported] == [expected]
    assert not cluster.executor._refused


def test_a_job_that_is_in_the_queue_all_the_same_is_taken_over(cluster: Cluster, job: Job) -> None:
    cluster.answers = [TIMED_OUT]
    work = "rule_train_wildcards_Pong_0_"
    cluster.queue = [
        ("Pong-0-train", slurm.QueuedJob("5", f"{work}abc")),
        ("Pong-0-train", slurm.QueuedJob("4", f"{work}other")),
    ]
    cluster.executor.run_job(job)
    assert cluster.reported == [("submitted", "5")] and cluster.submissions == 1


def test_a_job_stays_behind_another_while_sbatch_is_tried_and_not_in_its_next_attempt(
    cluster: Cluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: list[str] = []
    submit = slurm.SlurmExecutor.run_job
    monkeypatch.setattr(slurm.SlurmExecutor, "get_partition_arg", lambda executor, job: "-p gpu")

    def note(executor: Any, job: Job) -> None:
        options.append(executor.get_partition_arg(job))
        submit(executor, job)

    monkeypatch.setattr(slurm.SlurmExecutor, "run_job", note)
    left = slurm.QueuedJob("4", "rule_train_wildcards_Pong_0_other")
    cluster.executor._left = {"Pong-0-train": left}
    cluster.answers = [TIMED_OUT, None, None]
    cluster.executor.run_job(job)
    cluster.executor.run_job(job)
    plain = "-p gpu --job-name=Pong-0-train"
    assert options == [f"{plain} --dependency=afterany:4"] * 2 + [plain]


def test_nothing_is_submitted_while_squeue_does_not_answer(
    cluster: Cluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(place: str) -> None:
        raise slurm.WorkflowError("squeue failed: Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "_queue", no_answer)
    cluster.answers = [TIMED_OUT]
    cluster.executor.run_job(job)
    assert cluster.submissions == 1
    assert [what for what, _ in cluster.reported] == ["error"]


def test_who_ends_snakemake_does_not_wait_for_slurm(
    cluster: Cluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "PAUSES", (600.0,))
    cluster.answers = [TIMED_OUT]
    threading.Timer(0.2, cluster.executor._ending.set).start()
    cluster.executor.run_job(job)
    assert cluster.submissions == 1
    cluster.executor.run_job(job)
    assert cluster.submissions == 1, "nothing is submitted any more"


@pytest.mark.parametrize("permanent", [True, False])
def test_what_a_run_says_of_its_failure_decides_whether_it_is_tried_again(
    cluster: Cluster, job: Job, permanent: bool
) -> None:
    job.status(permanent=True, message="said before")
    cluster.answers = [None, None]
    cluster.executor.run_job(job)
    cluster.executor.report_job_error(SubmittedJobInfo(job, "7"), "node failure. ")
    assert job.attempt == 1, "what was said before the job was submitted does not count"
    cluster.executor.run_job(job)
    job.status(permanent=permanent, message="loss is nan")
    cluster.executor.report_job_error(SubmittedJobInfo(job, "8"), "failed. ")
    assert (job.attempt > job.restart_times) == permanent
    assert ("not tried again: loss is nan" in cluster.reported[-1][1]) == permanent


def test_states_are_told_by_squeue_and_else_by_output(
    cluster: Cluster, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SubmittedJobInfo(job, "7", {"slurm_logfile": tmp_path / "7.log"})
    clock = [1000.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock[0])
    cluster.states = None
    assert cluster.check(info) == [info], "squeue does not answer"
    for state in ("PENDING", "RUNNING", "COMPLETING", "PREEMPTED"):
        cluster.states = {"7": state}
        assert cluster.check(info) == [info]
    cluster.states = {}
    assert cluster.check(info) == [info], "its output may appear late"
    clock[0] += 59
    assert cluster.check(info) == [info] and not cluster.reported
    clock[0] += 2
    assert cluster.check(info) == []
    assert cluster.reported.pop()[0] == "error"
    Path(job.output[0]).touch()
    assert cluster.check(info) == []
    assert cluster.reported.pop()[0] == "success"
    for state, expected in (("COMPLETED", "success"), ("NODE_FAIL", "error"), ("FAILED", "error")):
        cluster.states = {"7": state}
        assert cluster.check(info) == []
        assert cluster.reported.pop()[0] == expected


def test_questions_become_rarer_while_nothing_ends(cluster: Cluster, job: Job) -> None:
    info = SubmittedJobInfo(job, "7", {})
    cluster.states = {"7": "RUNNING"}
    pauses = []
    for _ in range(30):
        cluster.check(info)
        pauses.append(cluster.executor.next_seconds_between_status_checks)
    assert pauses[:3] == [40, 60, 90] and pauses[-1] == slurm.LONGEST
    cluster.check()
    assert cluster.executor.next_seconds_between_status_checks == 40
