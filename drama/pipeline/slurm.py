"""Slurm jobs that are named after their runs, and that are not started a second time.

snakemake-executor-plugin-slurm gives all jobs of a call one random name and asks for their states
by that name. A Snakemake that was killed so leaves jobs behind that the next one does not know: it
would submit them again, to wait on GPUs of their own until the first ones leave the runs' folders.

The plugin also counts a moment in which Slurm does not answer as a failed attempt when it submits,
and forgets all jobs when it asks for states. How long Slurm knows a job that is over (MinJobAge),
and whether it keeps accounts, is the cluster's affair; here nothing depends on either.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_slurm import Executor as SlurmExecutor
from snakemake_executor_plugin_slurm.job_status_query import (
    query_job_status,
    query_job_status_squeue,
)
from snakemake_executor_plugin_slurm.utils import get_job_wildcards
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from drama.pipeline.campaign import Campaign
from drama.runs.folder import STATUS
from drama.runs.progress import Status

ENDING = frozenset({"COMPLETING", "STAGE_OUT"})
"""States of jobs that squeue still lists although they will do nothing more."""
FAILED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)
LOST = "no longer known, and its output is not there"
"""Stands for the state of a job that squeue does not list and that did not do its work."""

PASSING = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "temporarily unable to accept job",
    "Zero Bytes were transmitted or received",
    "Connection refused",
    "Connection timed out",
    "Connection reset",
    "Resource temporarily unavailable",
)
"""What sbatch says when Slurm does not answer for a moment."""
PAUSES = (5, 10, 20, 40, 80, 160)
"""Seconds before sbatch is tried again then, until that counts as a failed attempt."""
GROWTH, LONGEST = 1.5, 180
"""How pauses between two questions about states grow while no job ends, and to how many seconds."""


@dataclass(frozen=True)
class QueuedJob:
    """A Slurm job that waits or runs: its number, and its work in the plugin's words.

    These are rule, game, seed and fingerprint.
    """

    number: str
    work: str


def queued_jobs(folder: str) -> dict[str, QueuedJob]:
    """Return this user's jobs that wait or run with this working directory, by name.

    Raises:
        WorkflowError: when Slurm does not answer.
    """
    return dict(_queue(folder))


def _queue(folder: str) -> list[tuple[str, QueuedJob]]:
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%j|%k|%Z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WorkflowError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    jobs = []
    for line in done.stdout.splitlines():
        number, state, name, work, place = line.split("|", maxsplit=4)
        if state not in ENDING and os.path.realpath(place) == os.path.realpath(folder):
            jobs.append((name, QueuedJob(number, work)))
    return jobs


class Executor(SlurmExecutor):
    """The plugin's executor, with jobs called Pong-0-train, each of them in the queue once.

    A job that an earlier Snakemake left in the queue, started from the same folder for the same
    work, is taken over. One that works on the same run with other settings is left alone, and
    the new job is queued behind it. One whose run says that it would fail again is not tried again.
    """

    campaign: Campaign | None = None
    alone = True
    _pause = 0.0  # the thread that asks for states begins before __post_init__

    def __post_init__(self, test_mode: bool = False) -> None:
        super().__post_init__(test_mode)
        self._left: dict[str, QueuedJob] = queued_jobs(self.workflow.workdir_init)
        self._behind: dict[str, str] = {}
        self._refused: dict[Any, str | None] = {}
        self._said: dict[Any, Status | None] = {}
        self._unlisted: dict[str, float] = {}
        self._ending = threading.Event()

    @property
    def run_uuid(self) -> str:
        """The names to ask for states by: here, one for each job. (The plugin: one for all.)"""
        return ",".join(sorted(self._names))

    @run_uuid.setter
    def run_uuid(self, common: str) -> None:
        self._names = {common}

    def get_snakefile(self) -> str:
        """Return the Snakefile that jobs read: the campaign's, which nobody edits.

        Where another workflow uses this one as a module, it is that workflow's.
        """
        if self.campaign is None or not self.alone:
            return str(super().get_snakefile())
        return shlex.quote(str(self.campaign.folder.absolute() / "Snakefile"))

    def get_job_exec_prefix(self, job: Any) -> str:
        """Return what jobs begin with, so that the campaign's code is found, and no other."""
        if self.campaign is None:
            return ""
        return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(self.campaign.folder))}"

    def run_job(self, job: Any) -> None:
        """Submit a job, or go on with the one that is in the queue for it already."""
        if self._ending.is_set():
            return
        name = job_name(job)
        self._names = self._names | {name}
        self._said[job] = _status(job)
        left = self._left.pop(name, None)
        if left and left.work == _work(job):
            self._go_on_with(job, left, "from an earlier call")
            return
        if left:
            self.logger.info(
                f"{name} begins after Slurm job {left.number}, which works on the same run with "
                f"earlier settings; to have that one stop and save: scancel {left.number}"
            )
            self._behind[name] = left.number
        self._submit(job)
        self._behind.pop(name, None)

    def _go_on_with(self, job: Any, queued: QueuedJob, whence: str) -> None:
        """Take over a job that is in the queue."""
        self.logger.info(f"{job_name(job)} is in the queue {whence}: Slurm job {queued.number}.")
        folder = self.slurm_logdir / f"rule_{job.name}" / get_job_wildcards(job)
        aux = {"slurm_logfile": folder / f"{queued.number}.log"}
        self._report_job_submission_threadsafe(
            SubmittedJobInfo(job, external_jobid=queued.number, aux=aux)
        )

    def _submit(self, job: Any) -> None:
        """Submit a job, with pauses for as long as Slurm does not answer.

        The answer may have been lost when the job was in the queue already.
        """
        message = self._try_to_submit(job)
        for pause in PAUSES:
            refusal = (message or "").partition("sbatch call:")[0]
            if not any(words in refusal for words in PASSING):
                break
            self.logger.warning(
                f"{job_name(job)}: Slurm does not answer; next try in {pause} s. {refusal.strip()}"
            )
            if self._ending.wait(pause):
                break
            try:
                queue = _queue(self.workflow.workdir_init)
            except WorkflowError as error:
                message = str(error)
                continue
            for name, queued in queue:
                if (name, queued.work) == (job_name(job), _work(job)):
                    self._go_on_with(job, queued, "though sbatch failed")
                    return
            message = self._try_to_submit(job)
        if message:
            super()._report_job_error_threadsafe(SubmittedJobInfo(job), message)

    def _try_to_submit(self, job: Any) -> str | None:
        """Submit a job; returns the plugin's message if that failed."""
        self._refused[job] = None
        super().run_job(job)
        return self._refused.pop(job)

    def _report_job_error_threadsafe(self, job_info: SubmittedJobInfo, msg: str) -> None:
        """Report a job's error, but leave one in submitting to who submits."""
        if job_info.job in self._refused:
            self._refused[job_info.job] = msg
        else:
            super()._report_job_error_threadsafe(job_info, msg)

    def cancel(self) -> None:
        """Cancel all jobs, and wait for Slurm no longer where it does not answer."""
        self._ending.set()
        super().cancel()

    def report_job_error(self, job_info: SubmittedJobInfo, msg: Any = None, **more: Any) -> None:
        """Report a job's error; it was the last attempt if its run says that it would fail again.

        Only what was said since the job was submitted counts.
        """
        job, said = job_info.job, _status(job_info.job)
        if said and said.permanent and said != self._said.get(job):
            msg = f"{msg or ''} It would fail again, so it is not tried again: {said.message} "
            job.attempt = max(job.attempt, job.restart_times + 1)
        super().report_job_error(job_info, msg=msg, **more)

    async def check_active_jobs(
        self, active_jobs: Sequence[SubmittedJobInfo]
    ) -> AsyncIterator[SubmittedJobInfo]:
        """Report the jobs that are over, and yield those that are not.

        What squeue no longer lists is over: done if its output is there, failed if it does not
        appear within Snakemake's latency-wait.
        """
        states: dict[str, str] | None = {}
        if active_jobs:
            async with self.status_rate_limiter:
                command = query_job_status_squeue(self.run_uuid)
                states, _ = await query_job_status(command, self.logger)
        if states is None:
            self.logger.warning("squeue does not answer; jobs go on, and it is asked again.")
        over = False
        for info in active_jobs:
            state = self._state(info, states)
            if state == "COMPLETED":
                self.report_job_success(info)
                if not self.workflow.executor_settings.keep_successful_logs:
                    with suppress(OSError):
                        info.aux["slurm_logfile"].unlink()
            elif state in FAILED or state == LOST:
                text = f"Slurm job {info.external_jobid} failed, its state is {state}. "
                self.report_job_error(info, msg=text, aux_logs=[str(info.aux["slurm_logfile"])])
            else:
                yield info
                continue
            over = True
        shortest = self.workflow.executor_settings.init_seconds_before_status_checks
        longer = min(GROWTH * self._pause, LONGEST)
        self._pause = shortest if over or not active_jobs else max(longer, shortest)
        self.next_seconds_between_status_checks = self._pause

    def _state(self, info: SubmittedJobInfo, states: dict[str, str] | None) -> str:
        """Return a job's state, told from its output when squeue does not list the job."""
        if states is None:
            return "UNKNOWN"
        if state := states.get(info.external_jobid):
            self._unlisted.pop(info.external_jobid, None)
            return state
        if all(os.path.exists(file) for file in info.job.output):
            return "COMPLETED"
        since = self._unlisted.setdefault(info.external_jobid, time.monotonic())
        late = time.monotonic() - since >= self.workflow.execution_settings.latency_wait
        return LOST if late else "UNKNOWN"

    def get_partition_arg(self, job: Any) -> str:
        """Return the options of sbatch that pick the partition, and those that this class adds."""
        name = job_name(job)
        options = [super().get_partition_arg(job), f"--job-name={shlex.quote(name)}"]
        if name in self._behind:
            options.append(f"--dependency=afterany:{self._behind[name]}")
        return " ".join(options)


def job_name(job: Any) -> str:
    """Return what a job is called in Slurm's queue, such as Pong-0-train.

    Rules that share a job have one name together: Pong-0-run.
    """
    first = next(iter(job.jobs)) if job.is_group() else job
    wildcards = first.wildcards_dict
    run = [str(wildcards[key]) for key in ("game", "seed") if key in wildcards]
    return "-".join([*run, "run" if job.is_group() else job.name])


def _work(job: Any) -> str:
    """Return a job's work in the plugin's words."""
    wildcards = get_job_wildcards(job)
    return f"rule_{job.name}" + (f"_wildcards_{wildcards}" if wildcards else "")


def _status(job: Any) -> Status | None:
    """Return what the status.json says that lies beside a job's output; None without one."""
    return Status.read(Path(job.output[0]).with_name(STATUS)) if job.output else None


def use(campaign: Campaign | None = None, *, alone: bool = True) -> None:
    """Have Snakemake's `--executor slurm` run jobs, a campaign's or others, with this executor.

    Args:
        alone: whether all jobs are the campaign's.
    """
    Executor.campaign, Executor.alone = campaign, alone
    ExecutorPluginRegistry().get_plugin("slurm").executor = Executor
