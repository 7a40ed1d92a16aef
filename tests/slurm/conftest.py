"""A real Slurm of two nodes on this machine, with and without accounting; see up.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "launch"))

from tiny_run import write_shards  # noqa: E402


class Cluster:
    """The cluster's commands."""

    def __init__(self, accounting: bool) -> None:
        self.accounting = accounting
        self.environment = {"SLURM_CI_ACCT": str(int(accounting)), "SLURM_CI_DIR": "/dev/shm/hdm-slurm"}

    def up(self) -> "Cluster":
        done = subprocess.run([HERE / "up.sh"], env=os.environ | self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        os.environ["SLURM_CONF"] = f"{self.environment['SLURM_CI_DIR']}/slurm.conf"
        return self

    def down(self) -> None:
        subprocess.run([HERE / "down.sh"], env=os.environ | self.environment, capture_output=True, timeout=120)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(self.environment["SLURM_CI_DIR"], ignore_errors=True)

    @staticmethod
    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def jobs(self, state: str = "all") -> list[str]:
        """Ids of the jobs in `state`."""
        return self.ask("squeue", "-h", "-r", "-t", state, "-o", "%i").split()

    def restarts(self, job: str) -> int:
        text = self.ask("scontrol", "show", "job", job)
        return int(text.split("Restarts=")[1].split()[0])


def _brought_up(accounting: bool):
    missing = [
        name for name in ("slurmctld", "munged", *(["slurmdbd", "mariadbd"] if accounting else [])) if not shutil.which(name)
    ]
    if os.geteuid() != 0 or missing:
        pytest.skip(
            f"needs root and {', '.join(missing) or 'nothing else'} (apt-get install slurm-wlm slurmdbd mariadb-server munge)"
        )
    cluster = Cluster(accounting)
    cluster.down()
    return cluster.up()


@pytest.fixture(scope="module")
def accounted():
    cluster = _brought_up(accounting=True)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def bare():
    cluster = _brought_up(accounting=False)
    yield cluster
    cluster.down()


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)
