"""A Slurm that misbehaves, with a workflow of toy jobs and without a container."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import HERE

from drama.runs.locks import Holder, _is_over

SNAKEFILE = """
from drama.pipeline import slurm

slurm.use()


rule good:
    output: "runs/{name}/good.txt"
    shell: "echo {wildcards.name} >> attempts; sleep 1; touch {output}"


rule bad:
    output: "runs/{name}/bad.txt"
    shell: "echo {wildcards.name} >> attempts; sleep 1; false"


rule hopeless:
    output: "runs/{name}/hopeless.txt"
    shell:
        "echo {wildcards.name} >> attempts;"
        " echo '{{\\"fingerprint\\": \\"\\", \\"state\\": \\"failed\\", \\"step\\": 1,"
        " \\"total_steps\\": 2, \\"permanent\\": true, \\"message\\": \\"loss is nan\\"}}'"
        " > runs/{wildcards.name}/status.json;"
        " exit 3"


rule train:
    output: "shared/{game}/seed{seed}/trained"
    shell: "squeue -h -j $SLURM_JOB_ID -o '%j %i' >> queued; touch {output}"


rule evaluate:
    input: rules.train.output
    output: "shared/{game}/seed{seed}/evaluated"
    shell: "squeue -h -j $SLURM_JOB_ID -o '%j %i' >> queued; touch {output}"
"""
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def forgetful(cluster: Path) -> Iterator[None]:
    """Have squeue forget jobs within seconds of their end."""
    command = [HERE / "slurm", "up", cluster]
    subprocess.run(command, check=True, env=os.environ | {"MIN_JOB_AGE": "2"})
    yield
    subprocess.run(command, check=True)


@pytest.fixture
def snakemake(cluster: Path, tmp_path: Path) -> Call:
    (tmp_path / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")

    def call(
        *targets: str,
        interval: int = 3,
        retries: int = 0,
        path: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> object:
        """Run the workflow until it ends, asking for states at this interval, in seconds."""
        return subprocess.run(
            [sys.executable, "-m", "snakemake", "--executor", "slurm", "--jobs", "9",
             "--keep-going", "--latency-wait", "5", "--retries", str(retries),
             "--slurm-init-seconds-before-status-checks", str(interval),
             "--slurm-status-command", "squeue", "--default-resources", "slurm_partition=cpu",
             "slurm_account=testing", "runtime=5", "mem_mb=300", *options, "--", *targets],
            cwd=tmp_path,
            env=os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )  # fmt: skip

    return call  # type: ignore[return-value]


def forgetful_squeue(folder: Path) -> Path:
    """Put a squeue first that lists no job that is over.

    The real one forgets such jobs too where MinJobAge is small, but at moments of its own.
    """
    command = folder / "bin/squeue"
    command.parent.mkdir()
    text = f'#!/bin/sh\nexec {shutil.which("squeue")} "$@" --states=PENDING,RUNNING\n'
    command.write_text(text, encoding="utf-8")
    command.chmod(0o755)
    return command.parent


def attempts(folder: Path) -> list[str]:
    return sorted((folder / "attempts").read_text(encoding="utf-8").split())


def test_jobs_that_squeue_no_longer_lists_are_noticed(snakemake: Call, tmp_path: Path) -> None:
    done = snakemake("runs/a/good.txt", "runs/b/bad.txt", path=forgetful_squeue(tmp_path))
    assert done.returncode == 1, done.stdout
    assert (tmp_path / "runs/a/good.txt").exists()
    assert "Finished jobid" in done.stdout and "(Rule: good)" in done.stdout
    assert "Error in rule bad:" in done.stdout and "its state is no longer known" in done.stdout
    assert attempts(tmp_path) == ["a", "b"]


def test_a_run_that_would_fail_again_is_tried_once_and_another_as_often_as_asked(
    snakemake: Call, tmp_path: Path
) -> None:
    done = snakemake("runs/a/hopeless.txt", "runs/b/bad.txt", retries=1)
    assert done.returncode == 1, done.stdout
    assert "so it is not tried again: loss is nan" in done.stdout
    assert attempts(tmp_path) == ["a", "b", "b"]


def test_training_and_evaluation_can_share_a_job(snakemake: Call, tmp_path: Path) -> None:
    """As the cluster's profile offers."""
    target = "shared/Pong/seed0/evaluated"
    done = snakemake(target, options=("--groups", "train=run", "evaluate=run"))
    assert done.returncode == 0, done.stdout
    trained, evaluated = (tmp_path / "queued").read_text(encoding="utf-8").splitlines()
    assert trained == evaluated and trained.startswith("Pong-0-run ")


SBATCH = """#!/bin/sh
echo call >> {folder}/calls
if [ $(wc -l < {folder}/calls) -le {failures} ]; then
  {before}
  echo "sbatch: error: {said}" >&2
  exit 1
fi
exec {real} "$@"
"""
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"


def stand_in(folder: Path, failures: int, said: str = TIMED_OUT, before: str = ":") -> Path:
    """Put an sbatch first that fails a few times and then is the real one."""
    real = shutil.which("sbatch")
    command = folder / "bin/sbatch"
    command.parent.mkdir()
    before = before.format(real=real)
    text = SBATCH.format(folder=folder, failures=failures, said=said, real=real, before=before)
    command.write_text(text, encoding="utf-8")
    command.chmod(0o755)
    return command.parent


def calls(folder: Path) -> int:
    return (folder / "calls").read_text(encoding="utf-8").count("call")


def test_an_sbatch_that_fails_for_a_moment_costs_no_attempt(
    snakemake: Call, tmp_path: Path
) -> None:
    done = snakemake("runs/a/good.txt", path=stand_in(tmp_path, 2))
    assert done.returncode == 0, done.stdout
    assert "next try in 5 s. SLURM sbatch failed" in done.stdout
    assert "next try in 10 s" in done.stdout
    assert calls(tmp_path) == 3 and attempts(tmp_path) == ["a"]


def test_a_job_that_got_into_the_queue_all_the_same_is_not_submitted_twice(
    snakemake: Call, tmp_path: Path
) -> None:
    before = 'sleep 0; {real} --begin=now+8 "$@" >/dev/null'
    done = snakemake("runs/a/good.txt", path=stand_in(tmp_path, 1, before=before))
    assert done.returncode == 0, done.stdout
    assert "good is in the queue though sbatch failed: Slurm job" in done.stdout
    assert calls(tmp_path) == 1 and attempts(tmp_path) == ["a"]


def test_any_other_failure_of_sbatch_counts_at_once(snakemake: Call, tmp_path: Path) -> None:
    done = snakemake("runs/a/good.txt", path=stand_in(tmp_path, 9, "invalid partition specified"))
    assert done.returncode == 1, done.stdout
    assert "invalid partition specified" in done.stdout and "next try" not in done.stdout
    assert calls(tmp_path) == 1


@pytest.mark.usefixtures("forgetful")
def test_slurm_tells_whether_a_lock_holders_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, json; print(json.dumps(dict(os.environ)), flush=True)"
    command = f"{sys.executable} -c '{code}'; sleep 60"
    sbatch = ["sbatch", "--parsable", f"--output={tmp_path}/out", "--mem=100", f"--wrap={command}"]
    job = subprocess.run(sbatch, capture_output=True, text=True, check=True).stdout.strip()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    inside = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert inside["SLURM_JOB_ID"] == job
    monkeypatch.setenv("SLURM_CLUSTER_NAME", inside["SLURM_CLUSTER_NAME"])
    holder = Holder("node7", 1, job, "2026-11-01T10:00:00+00:00", inside["SLURM_CLUSTER_NAME"])
    assert not _is_over(holder)
    subprocess.run(["scancel", job], check=True)
    while not _is_over(holder):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    listed = ["squeue", "--noheader", "--states=all", f"--jobs={job}"]
    while subprocess.run(listed, capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline + 120
        time.sleep(0.5)
    assert _is_over(holder), "also when Slurm has forgotten it"
