"""Versions in object storage: a real S3 client against a real server, over HTTP."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry
from service import context as contexts
from service.doctor.examine import examine
from service.errors import Unavailable, VersionRejected
from service.serving import garbage
from service.settings import Settings
from service.storage.bucket import Bucket
from service.storage.objects import MANIFEST, OWNER
from tests.service import peft_files
from tests.service import s3 as servers
from tests.service.harness import Stack, error_of
from tests.service.processes import wait_for
from tests.service.s3 import Link, Stored, s3  # noqa: F401 - a fixture


@pytest.fixture
def line(s3: str) -> Iterator[Link]:  # noqa: F811
    with servers.link(s3) as made:
        yield made


@pytest.fixture
def stored(s3: str, line: Link, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stored]:  # noqa: F811
    """A fresh bucket. The service reaches it through the line, the test directly."""
    url = servers.make_bucket(s3)
    with servers.at(monkeypatch, s3):
        bucket = Bucket(url)
    with servers.at(monkeypatch, line.url):
        yield Stored(url, bucket)


@pytest.fixture
def helper(make_stack: Callable[..., Stack], stored: Stored) -> Stack:
    stack = make_stack(storage=stored.url)
    stack.alice.create()
    return stack


def version(stack: Stack, n: int) -> dict[str, Any]:
    (row,) = stack.rows("SELECT * FROM versions WHERE n = :n", n=n)
    return dict(row)


def copy_of(stack: Stack, n: int) -> Path:
    return stack.root / "cache" / str(version(stack, n)["digest"]).removeprefix("sha256:")


def look(stack: Stack, grace: float = 0.0) -> list[Any]:
    return list(examine(stack.context.database, stack.context.settings, grace=grace, with_engines=False))


def codes(stack: Stack) -> list[str]:
    return [f.code for f in look(stack) if f.code != "writable_by_all"]


def weights_key(stack: Stack, stored: Stored, n: int) -> str:
    files = version(stack, n)["files"]
    files = json.loads(files) if isinstance(files, str) else files
    (sha256,) = (f["sha256"] for f in files if f["name"] == "adapter/adapter_model.safetensors")
    return f"{version(stack, n)['uri']}/{sha256}"


def test_what_a_worker_sends_is_served_downloaded_and_trained_on(helper: Stack, stored: Stored) -> None:
    assert [helper.learn("one"), helper.learn("two")] == [1, 2]
    assert helper.alice.says("helper").endswith("-v2")
    assert helper.engine.adapters[helper.served(2)] == str(copy_of(helper, 2) / "adapter")
    assert f"{version(helper, 2)['uri']}/{MANIFEST}" in stored.keys("")
    path = "/v1/adapters/helper/versions/2/download"
    whole = helper.alice.get(path)
    again = helper.alice.get(path, headers={"if-none-match": whole.headers["etag"]})
    part = helper.alice.get(path, headers={"range": "bytes=10-19"})
    assert (whole.status_code, again.status_code, part.status_code) == (200, 304, 206)
    assert part.content == whole.content[10:20]
    with zipfile.ZipFile(io.BytesIO(whole.content)) as archive:
        assert archive.testzip() is None
    helper.alice.feedback("three")
    lease = helper.worker.must_lease()
    assert lease.parent is not None
    for file in lease.parent.files:
        answer = helper.worker.caller.get(f"/worker/v1/runs/{lease.run_id}/parent/{file.sha256}?token={lease.token}")
        assert (answer.status_code, len(answer.content)) == (200, file.size)
    assert codes(helper) == []


def _only(stack: Stack, n: int) -> bool:
    """After one more look: a version that another process held at its last beat stays until it says otherwise."""
    stack.converge()
    return list(stack.engine.adapters) == [stack.served(n)]


def test_another_host_has_its_own_copies(
    helper: Stack, stored: Stored, make_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    helper.learn("one")
    other = make_stack(storage=stored.url, adapters_dir=tmp_path / "other", publisher_lease_seconds=0.1)
    assert other.engine is not helper.engine
    other.converge()
    assert other.alice.get("/v1/adapters").json()["data"][0]["live_version"] == 1
    assert other.engine.adapters[other.served(1)].startswith(str(tmp_path / "other" / "cache"))
    assert other.alice.says("helper").endswith("-v1")
    helper.learn("two")
    wait_for("the other engine holds v2 alone: the publisher does not see it", lambda: _only(other, 2))


def test_bytes_are_checked_at_each_load(helper: Stack, stored: Stored, tmp_path: Path) -> None:
    helper.learn("one")
    weights = copy_of(helper, 1) / "adapter" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    directory = helper.context.storage.directory(version(helper, 1)["uri"], files_of(helper, 1))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == good, "a copy is replaced"

    stored.put(weights_key(helper, stored, 1), good[:-1] + b"!", tmp_path)
    shutil.rmtree(directory)
    with pytest.raises(VersionRejected, match="wrong_checksum"):
        helper.context.storage.directory(version(helper, 1)["uri"], files_of(helper, 1))
    stored.bucket.delete([weights_key(helper, stored, 1)])
    with pytest.raises(VersionRejected, match="not in the object storage"):
        helper.context.storage.directory(version(helper, 1)["uri"], files_of(helper, 1))
    assert codes(helper) == ["files_damaged"]
    assert [p for p in (helper.root / "cache").iterdir() if p.is_dir()] == []


def files_of(stack: Stack, n: int) -> list[Any]:
    files = version(stack, n)["files"]
    return [FileEntry.model_validate(f) for f in (json.loads(files) if isinstance(files, str) else files)]


def test_a_bucket_that_is_away_is_no_verdict(helper: Stack, line: Link) -> None:
    helper.alice.feedback("one")
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.worker.root, lease))
    assert helper.worker.send(lease, files[0]).status_code == 200
    line.cut()
    error_of(helper.worker.send(lease, files[1]), 503, "storage_unavailable")
    error_of(helper.worker.commit(lease, files), 503, "storage_unavailable")
    line.heal()
    for file in files[1:]:
        assert helper.worker.send(lease, file).status_code == 200
    assert helper.worker.commit(lease, files).json()["version"] == 1
    helper.converge()
    line.cut()
    shutil.rmtree(copy_of(helper, 1), ignore_errors=True)  # a pass that sees half of it moves it away
    helper.engine.forget()
    helper.converge()
    assert helper.engine.adapters == {}
    assert helper.alice.adapter()["live_version"] == 1, "not rejected"
    line.heal()
    helper.converge()
    assert helper.alice.says("helper").endswith("-v1")


def test_only_the_holder_of_the_lease_sends_and_only_what_it_says(helper: Stack) -> None:
    helper.alice.feedback("one")
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.worker.root, lease))
    error_of(helper.worker.send(lease.model_copy(update={"token": lease.token + 1}), files[0]), 409, "lease_lost")
    error_of(helper.worker.send(lease, files[0], b"other"), 400, "wrong_checksum")
    error_of(helper.worker.commit(lease, files), 422, "version_rejected")


def test_in_a_shared_directory_nothing_is_sent(stack: Stack) -> None:
    stack.alice.create()
    stack.alice.feedback("one")
    lease = stack.worker.must_lease()
    assert lease.files == "shared"
    files = peft_files.manifest(peft_files.write_version(stack.worker.root, lease))
    error_of(stack.worker.send(lease, files[0]), 409, "files_are_shared")


def test_what_a_crash_leaves_is_garbage_and_nothing_else(helper: Stack, stored: Stored) -> None:
    helper.learn("one")
    kept = stored.keys()
    helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.worker.root, lease))
    for file in files[:2]:
        helper.worker.send(lease, file)
    database, storage = helper.context.database, helper.context.storage
    assert garbage.collect(database, storage, grace=0.0) == [], "its run may still commit"
    helper.worker.fail(lease, retryable=False)
    assert garbage.collect(database, storage) == [], "young"
    assert codes(helper) == ["orphan_directory"]
    assert [o.name for o in garbage.collect(database, storage, grace=0.0)] == [lease.run_id]
    assert stored.keys() == kept
    assert codes(helper) == []


def test_versions_and_adapters_that_go_leave_nothing(helper: Stack, stored: Stored) -> None:
    for remark in ("one", "two", "three"):
        helper.learn(remark)
    uri = version(helper, 1)["uri"]
    helper.sql("UPDATE versions SET files_doomed_at = 1.0 WHERE n = 1")
    helper.converge()
    assert stored.keys(uri) == set()
    assert stored.keys(version(helper, 2)["uri"])
    helper.alice.ok("DELETE", "/v1/adapters/helper")
    helper.converge()
    helper.converge()
    assert stored.keys() == {OWNER}


def test_copies_go_when_no_engine_needs_them(helper: Stack) -> None:
    for remark in ("one", "two"):
        helper.learn(remark)
    storage, digests = helper.context.storage, {n: version(helper, n)["digest"] for n in (1, 2)}
    storage.tidy({digests[2]})
    assert copy_of(helper, 1).is_dir(), "used within the hour"
    storage._cache.evict({digests[2]}, grace=-1.0)  # type: ignore[attr-defined]
    assert not copy_of(helper, 1).exists()
    assert copy_of(helper, 2).is_dir()
    assert helper.alice.says("helper@v1").endswith("-v1"), "it is fetched again"


def test_an_upload_through_two_hosts(
    helper: Stack, stored: Stored, make_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    other = make_stack(storage=stored.url, adapters_dir=tmp_path / "other")
    lora = LoraSettings.model_validate(helper.alice.adapter()["lora"])
    bodies = {
        "adapter_config.json": json.dumps(peft_files.config(lora)).encode(),
        "adapter_model.safetensors": peft_files.encode(peft_files.tensors(lora, 0.25)),
    }
    sums = {}
    for name, body in bodies.items():
        answer = helper.alice.request("PUT", f"/v1/adapters/helper/upload/{name}", content=body)
        assert answer.status_code == 200, answer.text
        sums[name] = answer.json()["sha256"]
    commit = {"config_sha256": sums["adapter_config.json"], "weights_sha256": sums["adapter_model.safetensors"]}
    alice = type(helper.alice)(other.client, helper.alice.key)
    assert alice.ok("POST", "/v1/adapters/helper/upload/commit", commit)["version"] == 1
    assert not [k for k in stored.keys("") if ".uploads" in k]
    helper.converge()
    assert helper.alice.says("helper").endswith("-v1")
    assert codes(helper) == []


def test_versions_of_the_shared_directory_are_brought_over(make_stack: Callable[..., Stack], stored: Stored) -> None:
    before = make_stack()
    before.alice.create()
    before.learn("one")
    after = make_stack(storage=stored.url, publisher_lease_seconds=0.1)
    (finding,) = [f for f in look(after) if f.code == "files_not_stored"]
    assert finding.repair is not None
    finding.repair()
    assert "files_not_stored" not in codes(after)
    after.context.storage.directory(version(after, 1)["uri"], files_of(after, 1))


@pytest.mark.parametrize(
    ("url", "why"), [("s3://nowhere/prefix", "no such bucket"), ("s3://{bucket}/some/prefix", "another installation")]
)
def test_storage_that_cannot_be_used_is_said_at_start(
    stored: Stored, tmp_path: Path, model_dir: Path, url: str, why: str
) -> None:
    stored.bucket.claim(OWNER, "somebody else")
    url = url.format(bucket=stored.url.split("/")[2])
    settings = Settings.model_validate({"data_dir": tmp_path, "model_dir": model_dir, "storage": url})
    with pytest.raises(Unavailable, match=why) as failed:
        contexts.build(settings)
    assert servers.SECRET not in str(failed.value)


def test_a_line_that_is_cut_is_said_at_start(stored: Stored, line: Link, tmp_path: Path, model_dir: Path) -> None:
    line.cut()
    settings = Settings.model_validate({"data_dir": tmp_path, "model_dir": model_dir, "storage": stored.url})
    with pytest.raises(Unavailable, match=stored.url) as failed:
        contexts.build(settings)
    assert servers.SECRET not in str(failed.value)


@pytest.mark.parametrize("url", ["/data", "gs://bucket", "s3://", "s3://key:secret@bucket/prefix", "s3://bucket?x=1"])
def test_a_wrong_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX") as failed:
        Settings.model_validate({"data_dir": tmp_path, "storage": url})
    assert "key:secret" not in failed.value.errors()[0]["msg"]  # type: ignore[attr-defined]


def test_a_wrong_endpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL"):
        Settings.model_validate({"data_dir": tmp_path, "storage": "s3://bucket/prefix"})
