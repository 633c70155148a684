"""Slurm jobs that are named after their runs, and that are not started a second time.

snakemake-executor-plugin-slurm gives all jobs of a call one random name and asks for their states
by that name. A Snakemake that was killed so leaves jobs behind that the next one does not know: it
would submit them again, to wait on GPUs of their own until the first ones leave the runs' folders.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from typing import Any

from snakemake_executor_plugin_slurm import Executor as SlurmExecutor
from snakemake_executor_plugin_slurm.utils import get_job_wildcards
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from drama.pipeline.campaign import Campaign

ENDING = frozenset({"COMPLETING", "STAGE_OUT"})
"""States of jobs that squeue still lists although they will do nothing more."""


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
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%j|%k|%Z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WorkflowError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    jobs = {}
    for line in done.stdout.splitlines():
        number, state, name, work, place = line.split("|", maxsplit=4)
        if state not in ENDING and os.path.realpath(place) == os.path.realpath(folder):
            jobs[name] = QueuedJob(number, work)
    return jobs


class Executor(SlurmExecutor):
    """The plugin's executor, with jobs called Pong-0-train, each of them in the queue once.

    A job that an earlier Snakemake left in the queue, started from the same folder for the same
    work, is taken over. One that works on the same run with other settings is left alone, and
    the new job is queued behind it.
    """

    campaign: Campaign

    def __post_init__(self, test_mode: bool = False) -> None:
        super().__post_init__(test_mode)
        self._left: dict[str, QueuedJob] = queued_jobs(self.workflow.workdir_init)
        self._behind: dict[str, str] = {}

    @property
    def run_uuid(self) -> str:
        """The names to ask for states by: here, one for each job. (The plugin: one for all.)"""
        return ",".join(sorted(self._names))

    @run_uuid.setter
    def run_uuid(self, common: str) -> None:
        self._names = {common}

    def get_snakefile(self) -> str:
        """Return the Snakefile that jobs read: the campaign's, which nobody edits."""
        return shlex.quote(str(self.campaign.folder.absolute() / "Snakefile"))

    def get_job_exec_prefix(self, job: Any) -> str:
        """Return what jobs begin with, so that the campaign's code is found, and no other."""
        return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(self.campaign.folder))}"

    def run_job(self, job: Any) -> None:
        """Submit a job, or go on with the one that is in the queue for it already."""
        name = job_name(job)
        self._names = self._names | {name}
        left = self._left.pop(name, None)
        wildcards = get_job_wildcards(job)
        if left and left.work == f"rule_{job.name}_wildcards_{wildcards}":
            self.logger.info(
                f"{name} is in the queue from an earlier call: Slurm job {left.number}."
            )
            log = self.slurm_logdir / f"rule_{job.name}" / wildcards / f"{left.number}.log"
            self._report_job_submission_threadsafe(
                SubmittedJobInfo(job, external_jobid=left.number, aux={"slurm_logfile": log})
            )
            return
        if left:
            self.logger.info(
                f"{name} begins after Slurm job {left.number}, which works on the same run with "
                f"earlier settings; to have that one stop and save: scancel {left.number}"
            )
            self._behind[name] = left.number
        super().run_job(job)

    def get_partition_arg(self, job: Any) -> str:
        """Return the options of sbatch that pick the partition, and those that this class adds."""
        name = job_name(job)
        options = [super().get_partition_arg(job), f"--job-name={shlex.quote(name)}"]
        if name in self._behind:
            options.append(f"--dependency=afterany:{self._behind.pop(name)}")
        return " ".join(options)


def job_name(job: Any) -> str:
    """Return what a job is called in Slurm's queue, such as Pong-0-train."""
    wildcards = job.wildcards_dict
    run = [str(wildcards[key]) for key in ("game", "seed") if key in wildcards]
    return "-".join([*run, job.name])


def use(campaign: Campaign) -> None:
    """Have Snakemake's `--executor slurm` run a campaign's jobs with this executor."""
    Executor.campaign = campaign
    ExecutorPluginRegistry().get_plugin("slurm").executor = Executor
