"""A real PostgreSQL on this machine; see up.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "launch"))


class Database:
    """A throw-away server with the databases `optuna` and `mlflow`."""

    def __init__(self) -> None:
        self.environment = os.environ | {"PG_CI_DIR": "/dev/shm/hdm-postgres", "PG_CI_PORT": "15433", "PG_CI_FSYNC": "on"}
        self.uri = "postgresql://hdm@127.0.0.1:15433"

    def up(self) -> "Database":
        done = subprocess.run([HERE / "up.sh"], env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return self

    def down(self, *arguments: str) -> None:
        subprocess.run([HERE / "down.sh", *arguments], env=self.environment, capture_output=True, timeout=120)


@pytest.fixture
def database():
    if os.geteuid() != 0 or not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or not shutil.which("psql"):
        pytest.skip("needs root and PostgreSQL (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="needs psycopg (pip install 'psycopg[binary]')")
    database = Database()
    database.down()
    yield database.up()
    database.down()
