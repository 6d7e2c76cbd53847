"""As a new user: build the wheel, install it into a fresh environment, and follow the README to a published event."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, SourceDatabase, Stack, wait_for
from test_end_to_end import Reader

pytestmark = pytest.mark.platform

OLDEST = """
import google.protobuf
from outbox_client import Event, OutboxClient
from outbox_client.testing import FakePlatform

with FakePlatform() as platform, OutboxClient(platform.config()) as client:
    client.publish(Event("orders", "order", "1", "order.placed.v1", b"{}"))
    [event] = platform.published()
    print(google.protobuf.__version__, "published" if event.payload == b"{}" else event)
"""

PROJECT = Path(__file__).parents[1]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, PROJECT)
    [found] = directory.glob("*.whl")
    return found


def test_the_wheel_ships_one_package_and_all_of_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"outbox_client"}
    for needed in (
        "py.typed",
        "marker.sql",
        "_gen/outbox/v1/outbox_service_pb2.py",
        "django/migrations/0001_marker.py",
        "testing/plugin.py",
    ):
        assert f"outbox_client/{needed}" in names
    assert not [name for name in names if str(REPOSITORY) in name]


def test_the_oldest_dependencies_that_are_allowed(wheel: Path, tmp_path: Path) -> None:
    """The generated code is newer than the oldest protobuf: it must run there nevertheless."""
    uv = (REPOSITORY / "tools" / "python.sh", "-m", "uv")
    python = tmp_path / "venv" / "bin" / "python"
    run(*uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    [dependencies] = re.findall(r"^dependencies = \[(.*)\]$", (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    oldest = [f"{name}=={version}" for name, version in re.findall(r'"([a-z-]+)>=([0-9.]+)', dependencies)]
    assert len(oldest) == 3
    run(*uv, "pip", "install", "--quiet", "--python", python, wheel, *oldest)
    script = tmp_path / "oldest.py"
    script.write_text(OLDEST)
    assert run(python, script, env={"PYTHONPATH": ""}).split() == ["6.31.1", "published"]


def test_the_readme_leads_to_a_published_event(wheel: Path, stack: Stack, db: SourceDatabase, tmp_path: Path) -> None:
    [program] = re.findall(
        r"## SQLAlchemy, asyncio\n.*?```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL
    )
    assert len([line for line in program.splitlines() if line.strip()]) < 30
    placeholder = "postgresql+asyncpg://app@localhost/app"
    assert placeholder in program
    script = tmp_path / "app.py"
    script.write_text(program.replace(placeholder, db.asyncpg_url))
    db.execute(
        "ALTER TABLE orders ALTER id TYPE int USING id::int; ALTER TABLE orders ADD state text; INSERT INTO orders VALUES (1)"
    )

    # The versions that the tests run with, without their hashes: a wheel that was built just now has none.
    pins = re.findall(
        r"^[a-z0-9._-]+==\S+(?: ;[^\\\n]*)?", (PROJECT / "requirements-dev.txt").read_text(), re.MULTILINE
    )
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(pins))
    uv = (REPOSITORY / "tools" / "python.sh", "-m", "uv")
    venv = tmp_path / "venv"
    run(*uv, "venv", "--quiet", "--python", sys.executable, venv)
    python = venv / "bin" / "python"
    run(*uv, "pip", "install", "--quiet", "--python", python, "-c", constraints, f"{wheel}[sqlalchemy,asyncpg]")

    stack.register("readme")
    run(python, script, env={"PYTHONPATH": "", "OUTBOX_ADDRESS": stack.api, "OUTBOX_SOURCE": "readme"})
    reader = Reader(stack, "orders")
    wait_for(lambda: reader.poll(), "the record")
    reader.close()
    assert [(key, payload) for key, payload, _ in reader.records] == [("1", {"id": 1})]
    assert db.rows("SELECT state FROM orders") == [("paid",)]
    # What it does not need is not there, and nothing foreign was brought along.
    code = "import importlib.util as u, sys; print([m for m in ('buf', 'outbox', 'validate', 'django', 'psycopg') if u.find_spec(m)])"
    assert run(python, "-c", code, env={"PYTHONPATH": ""}).strip() == "[]"
