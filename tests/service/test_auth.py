"""Who may do what: keys, scopes, and two tenants who never see each other."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from service.app import PUBLIC_PATHS
from service.auth import KeyFirst
from service.db.engine import Database
from service.errors import BadRequest
from service.store.keys import CLIENT_SCOPES, WORKER_SCOPES, revoke, server_secret
from tests.service import peft_files
from tests.service.harness import Caller, Json, Stack, batch, error_of


def make_key(stack: Stack, *, tenant: str | None = "alice", scopes: Any = CLIENT_SCOPES, **fields: Any) -> str:
    with stack.context.database.write() as s:
        return stack.context.keys.create(s, tenant=tenant, name="extra", scopes=scopes, **fields)


def routes_of(stack: Stack) -> list[Route]:
    """Every route, those of included routers too."""

    def walk(routes: list[Any]) -> list[Route]:
        found: list[Route] = []
        for route in routes:
            inner = getattr(route, "original_router", route)  # how FastAPI keeps what was included
            found += [route] if isinstance(route, Route) else walk(inner.routes)
        return found

    return walk(list(stack.client.app.routes))  # type: ignore[attr-defined]


def example(path: str) -> str:
    """A path with every parameter filled in."""
    values = {"{run_id}": "run_0", "{version}": "1", "{model:path}": "helper"}
    for name, value in values.items():
        path = path.replace(name, value)
    return path.replace("{adapter}", "helper").replace("{batch}", "fb_0").replace("{job}", "job_0")


def guarded(route: Route) -> bool:
    """Whether the key is looked at before anything of the request is."""
    return isinstance(route, KeyFirst)


def schema_operations(stack: Stack) -> set[tuple[str, str]]:
    paths = stack.client.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


def test_every_route_is_public_by_name_or_guarded(stack: Stack) -> None:
    operations = schema_operations(stack)
    assert len(operations) >= 20
    for method, path in operations:
        answer = stack.client.request(method, example(path))
        if path in PUBLIC_PATHS:
            assert answer.status_code in (200, 503), path
        else:
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_no_route_escapes_the_test_above(stack: Stack) -> None:
    """A route that the schema hides would not have been called."""
    documented = {path for _, path in schema_operations(stack)}
    routes = routes_of(stack)
    assert {r.path.replace(":path", "") for r in routes} == documented | PUBLIC_PATHS
    assert [r.path for r in routes if r.path not in PUBLIC_PATHS and not guarded(r)] == []


def test_the_key_is_checked_before_the_body_is_read(stack: Stack) -> None:
    """Whoever has none makes us parse nothing: even what is no JSON at all is 401."""
    stack.alice.create()
    for path in ("/v1/feedback", "/v1/chat/completions", "/v1/adapters", "/worker/v1/leases"):
        junk = {"content": b"{" * 100_000, "headers": {"content-type": "application/json"}}
        error_of(stack.client.post(path, **junk), 401, "invalid_api_key")
        error_of(stack.alice.request("POST", path, **junk), 400, "invalid_json")


def test_a_key_that_another_process_revokes_ends_with_the_next_request(stack: Stack) -> None:
    """Nothing is remembered, and nothing has to be told."""
    stack.alice.create()
    assert stack.alice.post("/v1/feedback", batch("x")).status_code == 202
    other = Database(stack.context.settings.db_url)
    with other.write() as s:
        revoke(s, stack.alice.key.split("_")[1])
    other.close()
    error_of(stack.alice.post("/v1/feedback", batch("y")), 401, "invalid_api_key")
    assert stack.count("feedback_batches") == 1


def test_keys_that_are_not_good_look_alike(stack: Stack) -> None:
    good = stack.alice.key
    expired = make_key(stack, expires_in=-1.0)
    revoked = make_key(stack)
    stack.sql("UPDATE api_keys SET revoked_at = 1 WHERE id = :id", id=revoked.split("_")[1])
    other_secret = good[:-20] + ("0" if good[-20] != "0" else "1") + good[-19:]
    unknown = f"pk_{'0' * 16}_{'0' * 64}_{'0' * 8}"
    headers = [
        None, "", "Bearer", "Bearer ", f"Basic {good}", good, f"Bearer {good}x", f"Bearer  {good} x", "Bearer pk_",
        *(f"Bearer {key}" for key in (expired, revoked, other_secret, unknown, "sk-openai", "ключ", "x" * 5000)),
    ]  # fmt: skip
    bodies = set()
    for value in headers:
        sent = {} if value is None else {"authorization": value.encode()}
        answer = stack.client.get("/v1/jobs", headers=sent)
        error = error_of(answer, 401, "invalid_api_key")
        assert error["type"] == "authentication_error"
        bodies.add(answer.text)
    assert len(bodies) == 1
    assert stack.alice.get("/v1/jobs").status_code == 200


def test_the_key_may_come_in_anthropics_header(stack: Stack) -> None:
    good, bad = {"x-api-key": stack.alice.key}, {"x-api-key": f"{stack.alice.key}x"}
    assert stack.client.get("/v1/jobs", headers=good).status_code == 200
    error_of(stack.client.get("/v1/jobs", headers=bad), 401, "invalid_api_key")
    # What is sent as a bearer counts: another header does not make up for it.
    error_of(stack.client.get("/v1/jobs", headers=good | {"authorization": "Bearer x"}), 401, "invalid_api_key")


@pytest.mark.parametrize("scope", sorted(CLIENT_SCOPES))
def test_a_scope_opens_its_routes_and_no_others(stack: Stack, scope: str) -> None:
    caller = Caller(stack.client, make_key(stack, scopes={scope}))
    needs = {
        ("POST", "/v1/chat/completions"): "chat",
        ("POST", "/v1/completions"): "chat",
        ("GET", "/v1/models"): "chat",
        ("POST", "/v1/feedback"): "feedback:write",
        ("GET", "/v1/feedback/fb_0"): "jobs:read",
        ("GET", "/v1/jobs"): "jobs:read",
        ("POST", "/v1/jobs/job_0/cancel"): "jobs:write",
        ("POST", "/v1/jobs/job_0/requeue"): "jobs:write",
        ("POST", "/v1/adapters/a/pause"): "adapters:write",
        ("POST", "/v1/adapters/a/resume"): "adapters:write",
        ("GET", "/v1/adapters"): "adapters:read",
        ("GET", "/v1/adapters/helper/versions/1/download"): "adapters:read",
        ("POST", "/v1/adapters"): "adapters:write",
        ("DELETE", "/v1/adapters/helper"): "adapters:write",
        ("POST", "/v1/adapters/helper/promote"): "adapters:write",
        ("POST", "/worker/v1/leases"): "worker",
    }
    valid: dict[str, Json] = {
        "/v1/chat/completions": {"model": "x", "messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"model": "x", "prompt": "hi"},
        "/v1/feedback": batch("x"),
        "/v1/adapters": {"name": "made"},
        "/v1/adapters/helper/promote": {"version": 1},
        "/worker/v1/leases": {"worker_id": "w", "base_model": "b"},
    }
    for (method, path), needed in needs.items():
        answer = caller.request(method, path, json=valid.get(path))
        if needed == scope:
            assert answer.status_code != 403, (path, answer.text)
        else:
            assert error_of(answer, 403, "missing_scope")["type"] == "permission_error"


def test_a_workers_key_is_no_tenant_and_a_tenants_key_no_worker(stack: Stack) -> None:
    stack.alice.create()
    stack.alice.feedback()
    worker = stack.worker.caller
    for path in ("/v1/adapters", "/v1/jobs", "/v1/models", "/v1/adapters/helper"):
        error_of(worker.get(path), 403, "missing_scope")
    body = {"worker_id": "w", "base_model": peft_files.BASE}
    error_of(stack.alice.post("/worker/v1/leases", body), 403, "missing_scope")
    lease = stack.worker.must_lease()
    for verb in ("heartbeat", "commit", "fail", "release"):
        valid = {"token": lease.token, "error": {"code": "x", "message": "y"}, "retryable": True}
        answer = stack.alice.post(f"/worker/v1/runs/{lease.run_id}/{verb}", valid)
        assert answer.status_code in (403, 422), verb
    assert stack.rows("SELECT state FROM runs") == [{"state": "running"}]


@pytest.mark.parametrize(
    ("tenant", "scopes"),
    [("alice", {"worker"}), ("alice", {"chat", "worker"}), (None, {"chat"}), (None, CLIENT_SCOPES | WORKER_SCOPES),
     ("alice", set()), ("alice", {"admin"})],
)  # fmt: skip
def test_keys_that_would_be_both_or_neither_are_not_made(stack: Stack, tenant: str | None, scopes: set[str]) -> None:
    with pytest.raises(BadRequest):
        make_key(stack, tenant=tenant, scopes=scopes)


def test_one_tenant_sees_names_and_changes_nothing_of_another(stack: Stack) -> None:
    """Every route of bob with alice's ids."""
    stack.alice.create("hers")
    completion = stack.alice.chat("hers")["id"]
    sent = stack.alice.feedback(adapter="hers")
    stack.worker.train()
    stack.converge()
    queued = stack.alice.feedback(adapter="hers")
    adapter = stack.alice.adapter("hers")
    before = stack.alice.ok("GET", "/v1/adapters"), stack.alice.ok("GET", "/v1/jobs")
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    attempts: list[tuple[str, str, Json | None]] = [
        ("GET", f"/v1/jobs/{sent['job_id']}", None),
        ("GET", f"/v1/jobs?after={sent['job_id']}", None),
        ("GET", "/v1/jobs?adapter=hers", None),
        ("POST", f"/v1/jobs/{queued['job_id']}/cancel", None),
        ("POST", f"/v1/jobs/{queued['job_id']}/requeue", None),
        ("POST", "/v1/adapters/hers/pause", None),
        ("POST", "/v1/adapters/hers/resume", None),
        ("GET", f"/v1/feedback/{sent['id']}", None),
        ("POST", "/v1/feedback", {"items": [{"completion_id": completion, "feedback": "x"}]}),
        ("POST", "/v1/feedback", batch("x", adapter="hers")),
        ("GET", "/v1/adapters/hers", None),
        ("GET", f"/v1/adapters?after={adapter['id']}", None),
        ("DELETE", "/v1/adapters/hers", None),
        ("GET", "/v1/adapters/hers/versions", None),
        ("GET", "/v1/adapters/hers/versions/1", None),
        ("GET", "/v1/adapters/hers/versions/1/download", None),
        ("POST", "/v1/adapters/hers/promote", {"version": 0}),
        ("GET", "/v1/models/hers", None),
        ("GET", "/v1/models/hers@v1", None),
        *[
            ("POST", "/v1/chat/completions", chat | {"model": model})
            for model in ("hers", "hers@v1", adapter["id"], f"{adapter['id']}-v1")
        ],
    ]
    for method, path, body in attempts:
        answer = stack.bob.request(method, path, json=body)
        assert answer.status_code == 404, (method, path, answer.text)
    for path in ("/v1/jobs", "/v1/adapters"):
        assert stack.bob.ok("GET", path)["data"] == []
    assert [m["id"] for m in stack.bob.ok("GET", "/v1/models")["data"]] == [peft_files.BASE]
    assert (stack.alice.ok("GET", "/v1/adapters"), stack.alice.ok("GET", "/v1/jobs")) == before


def test_two_tenants_may_use_one_name_and_one_idempotency_key(stack: Stack) -> None:
    for caller in (stack.alice, stack.bob):
        caller.create("helper")
    ids = {caller.feedback(key="same-key")["id"] for caller in (stack.alice, stack.bob)}
    assert len(ids) == 2
    assert stack.alice.adapter()["id"] != stack.bob.adapter()["id"]


def test_keys_are_not_in_the_database_and_the_secret_is_private(stack: Stack) -> None:
    data = stack.context.settings.data_dir
    stack.context.database.close()
    content = b""
    for name in ("perennial.db-wal", "perennial.db"):  # in this order: a log that vanishes has gone into the file
        with suppress(FileNotFoundError):
            content += (data / name).read_bytes()
    assert b"alice" in content
    for key in (stack.alice.key, stack.worker.caller.key):
        _, public, secret, _ = key.split("_")
        assert public.encode() in content
        assert secret.encode() not in content
    secret_file = data / "server.secret"
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    assert secret_file.read_bytes().strip() not in content


def test_the_servers_secret_is_made_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "server.secret"
    secret = server_secret(path)
    assert len(secret) == 32
    assert server_secret(path) == secret
    assert [p.name for p in tmp_path.iterdir()] == ["server.secret"]
    path.write_text("")
    with pytest.raises(ValueError, match="32 bytes"):
        server_secret(path)


def test_the_servers_secret_is_on_disk_before_it_is_used(tmp_path: Path) -> None:
    """Its bytes before it has its name, its name before anybody gets it; the name also where another made it."""
    path, synced = tmp_path / "server.secret", []

    def sync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append(("names" if target == tmp_path else f"{target.stat().st_size} bytes", path.exists()))

    for _ in range(2):
        server_secret(path, sync)
    assert synced == [("64 bytes", False), ("names", True), ("names", True)]


def test_keys_of_another_server_do_not_open(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    key = stack.alice.key
    (stack.context.settings.data_dir / "server.secret").unlink()
    again = make_stack()
    error_of(Caller(again.client, key).get("/v1/jobs"), 401, "invalid_api_key")
