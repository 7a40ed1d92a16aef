"""A real Slurm of two nodes on this machine, with and without accounting; see up.sh."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "launch"))

from tiny_run import write_shards  # noqa: E402


class Cluster:
    """The cluster's commands. One with accounting and one without may be up together."""

    def __init__(self, accounting: bool) -> None:
        folder, port = ("/dev/shm/hdm-slurm", "16817") if accounting else ("/dev/shm/hdm-slurm-bare", "16827")
        self.folder = Path(folder)
        self._setting = {"SLURM_CI_ACCT": str(int(accounting)), "SLURM_CI_DIR": folder, "SLURM_CI_PORT": port}
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}

    def up(self) -> "Cluster":
        done = subprocess.run([HERE / "up.sh"], env=os.environ | self._setting, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return self

    def down(self) -> None:
        subprocess.run([HERE / "down.sh"], env=os.environ | self._setting, capture_output=True, timeout=120)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=True).stdout

    def jobs(self, state: str = "all") -> list[str]:
        """Ids of the jobs in `state`."""
        return self.ask("squeue", "-h", "-r", "-t", state, "-o", "%i").split()

    def minutes(self, job: str) -> int:
        """Whole minutes for which `job` has run."""
        (found,) = re.findall(r"RunTime=00:(\d\d):", self.ask("scontrol", "show", "job", job))
        return int(found)

    def limit(self, job: str, minutes: int) -> None:
        """Give `job` another time limit."""
        self.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def restarts(self, job: str) -> int:
        text = self.ask("scontrol", "show", "job", job)
        return int(text.split("Restarts=")[1].split()[0])


def _brought_up(accounting: bool):
    daemons = ["slurmctld", "munged", *(["slurmdbd", "mariadbd"] if accounting else [])]
    missing = [name for name in daemons if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(
            f"needs root and {', '.join(missing) or 'nothing else'} (apt-get install slurm-wlm munge slurmdbd mariadb-server)"
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
