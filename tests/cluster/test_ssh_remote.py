"""A DVC remote over ssh: a real sshd on the loopback, one clone pushes, another pulls."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dvc_project import Clone, make_trained

SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Server:
    """An sshd of the test's own, and the folder that it serves as a remote."""

    port: int
    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "storage"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(free_port(), tmp_path_factory.mktemp("ssh"))
    server.storage.mkdir()
    for key in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", server.folder / key], check=True
        )
    configuration = server.folder / "sshd_config"
    configuration.write_text(SSHD.format(port=server.port, folder=server.folder), encoding="utf-8")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd demands it
    log = server.folder / "log"
    process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", configuration, "-E", log])
    try:
        deadline = time.monotonic() + 30
        while not answers(server.port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait()


def use(clone: Clone, server: Server) -> None:
    """Set the remote up as the comment in .dvc/config says."""
    url = f"ssh://127.0.0.1:{server.port}{server.storage}"
    settings = {"user": "root", "keyfile": str(server.folder / "user_key"), "verify": "true"}
    clone.run("dvc", "remote", "add", "--local", "--default", "lab", url)
    for key, value in settings.items():
        clone.run("dvc", "remote", "modify", "--local", "lab", key, value)


@pytest.fixture(scope="module")
def pushed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = make_trained(tmp_path_factory.mktemp("pushed") / "clone")
    use(clone, server)
    clone.run("drama", "record")
    clone.run("dvc", "push", "--quiet")
    clone.commit()
    return clone


def test_another_clone_pulls_what_one_pushed(pushed: Clone, server: Server, tmp_path: Path) -> None:
    other = pushed.clone(tmp_path / "other")
    use(other, server)
    other.run("dvc", "pull", "--quiet", "train@Pong-0")
    assert other.present("Pong") == pushed.blobs("Pong")
    assert other.present("Boxing") == {}
    other.run("dvc", "pull", "--quiet")
    assert other.present("Boxing") == pushed.blobs("Boxing")
    assert "up to date" in other.run("dvc", "status")


def test_a_corrupted_blob_is_refused(pushed: Clone, server: Server, tmp_path: Path) -> None:
    other = pushed.clone(tmp_path / "other")
    use(other, server)
    name = pushed.remote_blob("Pong")
    blob = server.storage / "files/md5" / name.parent.name / name.name
    good = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    recipe = "results/tiny/recipes/Pong/seed0.json"
    (evaluation,) = other.results("runs/Pong/seed0/evaluation-*.parquet")
    score = evaluation.read_bytes()
    evaluation.unlink()

    process = other.start("dvc", "pull")
    output, _ = process.communicate()
    assert process.returncode != 0, output
    assert "runs/Pong/seed0/checkpoint.parquet" in output
    assert "checkpoint.parquet" not in other.present("Pong")
    assert other.present("Boxing") == pushed.blobs("Boxing")
    output = other.run("drama", "evaluate", recipe, "--device", "cpu", expected=1)
    assert "damaged in remote 'lab'" in output and str(blob) in output
    assert "dvc push train@Pong-0" in output and "Traceback" not in output

    blob.write_bytes(good)
    other.run("drama", "evaluate", recipe, "--device", "cpu")
    assert evaluation.read_bytes() == score
