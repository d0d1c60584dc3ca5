"""Versions over HTTP: whole and right or not there at all, and room for the next."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api_schemas.worker import FileEntry, Lease, ParentVersion
from worker import transfer
from worker.errors import LeaseLostError, ServiceUnavailableError
from worker.service_client import ServiceClient
from worker.versions import scan, version_digest

BODIES = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"w" * 3000, "trainer/a": b"m"}
FILES = [FileEntry(name=name, size=len(body), sha256=hashlib.sha256(body).hexdigest()) for name, body in BODIES.items()]
ONE_OF = {f.sha256: BODIES[f.name] for f in FILES}
PARENT = ParentVersion(version=1, uri="adp_1/run_0", digest=version_digest(FILES), files=FILES)
Answer = Callable[[httpx2.Request], httpx2.Response]


def serves(request: httpx2.Request) -> httpx2.Response:
    """The parent's files to whoever holds the lease."""
    assert dict(request.url.params) == {"token": "7"}
    return httpx2.Response(200, content=ONE_OF[request.url.path.rsplit("/", 1)[-1]])


def call(answer: Answer, what: Callable[[ServiceClient], Any]) -> None:
    async def run() -> None:
        transport = httpx2.MockTransport(answer)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as http:
            await what(ServiceClient(http))

    asyncio.run(run())


@pytest.fixture
def lease(make_lease: Callable[..., Lease]) -> Lease:
    return make_lease(parent=PARENT, files="http", token=7)


def fetch(lease: Lease, root: Path, answer: Answer = serves) -> int:
    """How many pieces came."""
    moved: list[None] = []
    call(answer, lambda c: transfer.fetch_parent(c, lease, root, lambda: moved.append(None)))
    return len(moved)


def test_the_parent_comes_once_and_a_damaged_copy_anew(lease: Lease, tmp_path: Path) -> None:
    place = tmp_path / "adp_1" / "run_0"
    assert fetch(lease, tmp_path) == 3
    assert version_digest(scan(place)) == PARENT.digest
    assert fetch(lease, tmp_path) == 0
    (place / "adapter" / "adapter_config.json").write_bytes(b"[]")
    assert fetch(lease, tmp_path) == 3
    assert version_digest(scan(place)) == PARENT.digest


def test_an_uploaded_parent_has_no_trainer_directory(lease: Lease, tmp_path: Path) -> None:
    files = [f for f in FILES if f.name.startswith("adapter/")]
    parent = PARENT.model_copy(update={"files": files, "digest": version_digest(files)})
    fetch(lease.model_copy(update={"parent": parent}), tmp_path)
    assert sorted(p.name for p in (tmp_path / "adp_1" / "run_0").iterdir()) == ["adapter"]


@pytest.mark.parametrize("answer", ["breaks", "other bytes", "lease lost"])
def test_what_does_not_come_whole_is_not_there(lease: Lease, tmp_path: Path, answer: str) -> None:
    def handle(request: httpx2.Request) -> httpx2.Response:
        if not request.url.path.endswith(FILES[-1].sha256):
            return serves(request)
        if answer == "breaks":
            raise httpx2.ReadError("cut")
        if answer == "other bytes":
            return httpx2.Response(200, content=b"x")
        error = {"code": "lease_lost", "message": "over", "type": "conflict_error", "param": None}
        return httpx2.Response(409, json={"error": error})

    with pytest.raises(LeaseLostError if answer == "lease lost" else ServiceUnavailableError):
        fetch(lease, tmp_path, handle)
    assert [p.name for p in (tmp_path / "adp_1").iterdir()] == [".own-run_0"]


def test_a_file_is_sent_as_it_is(lease: Lease, tmp_path: Path) -> None:
    path = tmp_path / lease.adapter_id / lease.run_id / FILES[1].name
    path.parent.mkdir(parents=True)
    path.write_bytes(BODIES[FILES[1].name])
    seen: list[httpx2.Request] = []

    def take(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={"sha256": FILES[1].sha256, "size": FILES[1].size})

    call(take, lambda c: transfer.send(c, lease, FILES[1], tmp_path, lambda: None))
    assert (seen[0].method, seen[0].url.path) == ("PUT", f"/worker/v1/runs/{lease.run_id}/files/{FILES[1].sha256}")
    assert seen[0].headers["content-length"] == "3000"
    assert seen[0].url.params["token"] == "7"


def test_the_longest_unused_goes_and_what_is_needed_or_foreign_stays(lease: Lease, tmp_path: Path) -> None:
    for age, name in enumerate(["run_0", "newer", "older", "oldest", "foreign"]):
        body = tmp_path / "adp_1" / name / "adapter" / "weights"
        body.parent.mkdir(parents=True)
        body.write_bytes(b"x" * 100)
        if name != "foreign":
            marker = tmp_path / "adp_1" / f".own-{name}"
            marker.touch()
            os.utime(marker, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "adp_1" / ".own-run_0", (1, 1))  # the parent, unused for longest
    (tmp_path / "adp_1" / ".fetch-0123456789abcdef").mkdir()
    transfer.begin(tmp_path, lease, 250)
    left = {p.name for p in (tmp_path / "adp_1").iterdir()}
    assert left == {"run_0", "newer", "foreign", ".own-run_0", ".own-newer", f".own-{lease.run_id}"}


def test_what_leases_beside_it_need_is_not_swept_away(make_lease: Any, tmp_path: Path) -> None:
    parent = {"version": 1, "uri": "adp_2/run_0", "digest": "sha256:0"}
    beside = make_lease("adp_2", run_id="run_9", parent=parent)
    for name in ("run_0", "run_9", "old"):
        (tmp_path / "adp_2" / name).mkdir(parents=True)
        (tmp_path / "adp_2" / name / "weights").write_bytes(b"x" * 100)
        (tmp_path / "adp_2" / f".own-{name}").touch()
    transfer.begin(tmp_path, make_lease("adp_1"), 0, [beside])
    assert {p.name for p in (tmp_path / "adp_2").iterdir() if p.is_dir()} == {"run_0", "run_9"}
