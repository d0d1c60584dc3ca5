"""The `perennial` command and the settings that it reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from service.cli import app
from service.db.engine import Database
from service.local import free_port
from service.settings import Settings
from service.store.keys import CLIENT_SCOPES, KeyRing, server_secret

Run = Callable[..., Result]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path) -> Run:
    runner = CliRunner(env={"PERENNIAL_DATA_DIR": str(data_dir), "PERENNIAL_DATABASE_URL": ""})
    return lambda *args: runner.invoke(app, args)


def owner(data_dir: Path, key: str) -> tuple[str | None, frozenset[str]] | None:
    """Tenant id and scopes of a good key."""
    database = Database(f"sqlite:///{data_dir / 'perennial.db'}")
    with database.read() as s:
        found = KeyRing(server_secret(data_dir / "server.secret")).check(s, key)
    database.close()
    return None if found is None else (found.tenant_id, found.scopes)


@pytest.mark.parametrize("command", [("serve",), ("keys", "create"), ("keys", "list"), ("keys", "revoke", "x")])
def test_nothing_runs_on_a_database_that_was_not_migrated(run: Run, data_dir: Path, command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert "perennial migrate" in result.output
    assert "Traceback" not in result.output
    assert not data_dir.exists(), "a look changes nothing"


def test_keys_are_made_listed_and_revoked(run: Run, data_dir: Path) -> None:
    for _ in range(2):
        assert run("migrate").exit_code == 0
    made = run("keys", "create", "--tenant", "acme", "--name", "laptop", "--scope", "chat", "--scope", "jobs:read")
    key = made.output.strip()
    found = owner(data_dir, key)
    assert found is not None
    assert found[1] == {"chat", "jobs:read"}
    worker = run("keys", "create", "--worker").output.strip()
    assert owner(data_dir, worker) == (None, frozenset({"worker"}))
    default = owner(data_dir, run("keys", "create").output.strip())
    assert default is not None
    assert default[1] == CLIENT_SCOPES
    listing = run("keys", "list").output
    assert len(listing.splitlines()) == 3
    assert "acme" in listing
    assert "laptop" in listing
    assert key.split("_")[2] not in listing
    assert run("keys", "revoke", key.split("_")[1]).exit_code == 0
    assert owner(data_dir, key) is None
    assert "revoked" in run("keys", "list").output
    for given in (worker, f"pk_{worker.split('_')[1]}"):  # as it was printed, and as people cut it out
        assert run("keys", "revoke", given).exit_code == 0
    assert owner(data_dir, worker) is None
    missing = run("keys", "revoke", "0000")
    assert (missing.exit_code, missing.output.strip()) == (1, "No such key.")


def test_keys_expire(run: Run, data_dir: Path) -> None:
    run("migrate")
    assert owner(data_dir, run("keys", "create", "--days", "1").output.strip()) is not None
    assert owner(data_dir, run("keys", "create", "--days", "0").output.strip()) is None
    assert run("keys", "create", "--days", "-1").exit_code == 2


@pytest.mark.parametrize(
    "options", ["--worker --tenant x", "--scope worker", "--scope everything", "--worker --scope chat"]
)
def test_keys_that_make_no_sense_are_refused(run: Run, options: str) -> None:
    run("migrate")
    result = run("keys", "create", *options.split())
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "pk_" not in result.output


def test_serve_says_what_is_missing(run: Run) -> None:
    run("migrate")
    result = run("serve")
    assert result.exit_code == 1
    assert "PERENNIAL_MODEL_DIR" in result.output


def test_client_commands_say_when_there_is_no_service() -> None:
    runner = CliRunner(env={"PERENNIAL_URL": "http://127.0.0.1:9", "PERENNIAL_API_KEY": "x"})
    for command in (["adapters", "list"], ["jobs", "list"], ["chat", "m", "hi"], ["feedback", "show", "x"]):
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        assert "No service at http://127.0.0.1:9" in result.output


def ended(result: Result) -> str:
    """What a command said that ended by itself, with status 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    return result.output


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9", "http://", "http://127.0.0.1:99999", "http://[::1", "ftp://x", "http://\u0001", "http://.."]
)
def test_a_url_that_is_none_is_said(url: str) -> None:
    runner = CliRunner(env={"PERENNIAL_URL": url, "PERENNIAL_API_KEY": "x"})
    assert "No service at" in ended(runner.invoke(app, ["adapters", "list"]))


class Elsewhere(BaseHTTPRequestHandler):
    """Some other web server."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/v1/jobs?limit=100" else 200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


def test_a_url_of_something_else_is_said(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        runner = CliRunner(env={"PERENNIAL_URL": f"http://127.0.0.1:{server.server_port}", "PERENNIAL_API_KEY": "x"})
        assert "without /v1" in ended(runner.invoke(app, ["adapters", "list"]))
        assert "answered 404" in ended(runner.invoke(app, ["jobs", "list"]))
        download = ["adapters", "download", "h", "1", "--output", str(tmp_path)]
        assert "cannot be written" in ended(runner.invoke(app, download))
        server.shutdown()


def test_settings_as_json_and_keys_that_are_none() -> None:
    runner = CliRunner(env={"PERENNIAL_URL": "http://127.0.0.1:9", "PERENNIAL_API_KEY": "x"})
    assert "--training is not JSON" in ended(
        runner.invoke(app, ["adapters", "create", "h", "--training", "{steps: 3}"])
    )
    for key in ("", "pk_é", "Bearer x"):
        runner = CliRunner(env={"PERENNIAL_URL": "http://127.0.0.1:9", "PERENNIAL_API_KEY": key})
        assert "PERENNIAL_API_KEY" in ended(runner.invoke(app, ["adapters", "list"]))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PERENNIAL_PORT", "many"), ("PERENNIAL_LEASE_SECONDS", "0"), ("PERENNIAL_DATABASE_PASSWORD_FILE", "/nowhere")],
)
@pytest.mark.parametrize("command", [("serve",), ("migrate",), ("keys", "list")])
def test_a_wrong_setting_is_named(data_dir: Path, variable: str, value: str, command: tuple[str, ...]) -> None:
    runner = CliRunner(env={"PERENNIAL_DATA_DIR": str(data_dir), variable: value})
    assert variable.removesuffix("_FILE") in ended(runner.invoke(app, command)).upper()


def test_a_data_directory_that_cannot_be(run: Run, data_dir: Path) -> None:
    data_dir.write_text("a file")
    assert "cannot be used" in ended(run("migrate"))
    ended(run("up", "--data-dir", str(data_dir)))
    assert ended(run("health", "http://[::1"))


def test_help_needs_no_torch_and_little_time() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from service.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'safetensors')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().data_dir == tmp_path / "perennial-data"
    assert Settings().db_url == f"sqlite:///{tmp_path / 'perennial-data' / 'perennial.db'}"
    assert Settings().host == "127.0.0.1", "nothing is published unless told"
    values = {
        "PERENNIAL_DATA_DIR": str(tmp_path / "d"),
        "PERENNIAL_MODEL_DIR": "/models/qwen",
        "PERENNIAL_ENGINE_ADAPTERS_DIR": "/engine/adapters",
        "PERENNIAL_LEASE_SECONDS": "7.5",
        "PERENNIAL_ENGINE_API_KEY": "hush",
        "PERENNIAL_PORT": "",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.adapters_root == tmp_path / "d" / "adapters"
    assert settings.engine_adapters_root == Path("/engine/adapters")
    assert settings.base_name == "qwen"
    assert settings.lease_seconds == 7.5
    assert settings.port == 8700, "an empty variable is an unset one"
    assert "hush" not in repr(settings)


@pytest.mark.parametrize(("name", "value"), [("PORT", "70000"), ("LEASE_SECONDS", "0"), ("MAX_ATTEMPTS", "many")])
def test_settings_out_of_bounds_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"PERENNIAL_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_init_makes_keys_once_and_mends_them(run: Run, data_dir: Path, tmp_path: Path) -> None:
    worker_key = tmp_path / "keys" / "worker.key"
    command = ("init", "--worker-key", str(worker_key))
    for _ in range(2):
        assert run(*command).exit_code == 0
    client = (data_dir / "client.key").read_text().strip()
    worker = worker_key.read_text().strip()
    made = owner(data_dir, client)
    assert made is not None
    assert made[1] == CLIENT_SCOPES
    assert owner(data_dir, worker) == (None, frozenset({"worker"}))
    assert len(run("keys", "list").output.splitlines()) == 2
    assert worker_key.stat().st_mode & 0o077 == 0
    run("keys", "revoke", worker.split("_")[1])
    assert run(*command).exit_code == 0
    assert worker_key.read_text().strip() != worker
    assert (data_dir / "client.key").read_text().strip() == client


def test_init_says_what_it_cannot_write(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("init", "--worker-key", str(tmp_path / "file" / "worker.key"))
    assert result.exit_code == 1
    assert "cannot be prepared" in result.output
    assert "Traceback" not in result.output


def test_health_of_nothing_is_bad(run: Run) -> None:
    result = run("health", f"http://127.0.0.1:{free_port()}/healthz")
    assert result.exit_code == 1
    assert "ConnectError" in result.output


def test_secrets_may_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("s3/cret\n")
    monkeypatch.setenv("PERENNIAL_DATABASE_URL", "postgresql+psycopg://perennial@db/perennial")
    monkeypatch.setenv("PERENNIAL_DATABASE_PASSWORD_FILE", str(tmp_path / "password"))
    assert Settings().db_url == "postgresql+psycopg://perennial:s3%2Fcret@db/perennial"
    assert "s3" not in repr(Settings().database_password)
    monkeypatch.setenv("PERENNIAL_DATABASE_PASSWORD", "other")
    with pytest.raises(ValueError, match="give one of the two"):
        Settings()
    monkeypatch.setenv("PERENNIAL_DATABASE_PASSWORD", "")
    monkeypatch.setenv("PERENNIAL_DATABASE_PASSWORD_FILE", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent cannot be read"):
        Settings()
