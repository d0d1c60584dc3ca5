"""Versions: what is listed, downloaded and promoted."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from tests.service import peft_files
from tests.service.harness import Stack, error_of

DOWNLOAD = "/v1/adapters/helper/versions/1/download"


@pytest.fixture
def learnt(stack: Stack) -> Stack:
    """An adapter with version 1 published and live."""
    stack.alice.create()
    stack.learn("one")
    return stack


def promote(stack: Stack, n: int) -> object:
    return stack.alice.post("/v1/adapters/helper/promote", {"version": n})


def test_the_download_is_exactly_the_peft_directory(learnt: Stack) -> None:
    answer = learnt.alice.get(DOWNLOAD)
    assert answer.headers["content-type"] == "application/zip"
    assert 'filename="helper-v1.zip"' in answer.headers["content-disposition"]
    uri = learnt.rows("SELECT uri FROM versions")[0]["uri"]
    written = {p.name: p.read_bytes() for p in (learnt.root / uri / "adapter").iterdir()}
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert {n: archive.read(n) for n in archive.namelist()} == written
    assert set(written) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads(written["adapter_config.json"])["base_model_name_or_path"] == peft_files.BASE


def test_the_download_is_the_same_each_time_and_can_be_continued(learnt: Stack) -> None:
    first = learnt.alice.get(DOWNLOAD)
    etag = first.headers["etag"]
    for archive in learnt.context.settings.archives_root.iterdir():
        archive.unlink()
    again = learnt.alice.get(DOWNLOAD)
    assert again.content == first.content, "built anew, byte for byte the same"
    assert again.headers["etag"] == etag
    for tags in (etag, f"W/{etag}", f'"other", {etag}'):
        unchanged = learnt.alice.get(DOWNLOAD, headers={"if-none-match": tags})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == etag
    assert learnt.alice.get(DOWNLOAD, headers={"if-none-match": '"other"'}).status_code == 200
    size = len(first.content)
    part = learnt.alice.get(DOWNLOAD, headers={"range": "bytes=10-29", "if-range": etag})
    assert (part.status_code, part.content) == (206, first.content[10:30])
    assert part.headers["content-range"] == f"bytes 10-29/{size}"
    beyond = learnt.alice.get(DOWNLOAD, headers={"range": f"bytes={size}-"})
    error_of(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{size}"
    error_of(learnt.alice.get(DOWNLOAD, headers={"range": "lines=1-2"}), 400, "invalid_range")
    changed = learnt.alice.get(DOWNLOAD, headers={"range": "bytes=10-29", "if-range": '"other"'})
    assert (changed.status_code, changed.content) == (200, first.content)


def test_a_damaged_version_is_not_handed_out(learnt: Stack) -> None:
    uri = learnt.rows("SELECT uri FROM versions")[0]["uri"]
    weights = learnt.root / uri / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    error_of(learnt.alice.get(DOWNLOAD), 422, "version_rejected")
    assert not list(learnt.context.settings.archives_root.glob("*"))


def test_storage_that_fails_is_503_and_leaves_no_halves(learnt: Stack) -> None:
    archives = learnt.context.settings.archives_root
    archives.parent.mkdir(exist_ok=True)
    archives.write_text("a file where a directory should be")
    answer = learnt.alice.get(DOWNLOAD)
    error_of(answer, 503, "storage_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    archives.unlink()
    assert learnt.alice.get(DOWNLOAD).status_code == 200
    assert [p.suffix for p in archives.iterdir()] == [".zip"]


def test_versions_are_listed_oldest_first_in_pages(learnt: Stack) -> None:
    learnt.learn("two")
    learnt.learn("three")
    page = learnt.alice.ok("GET", "/v1/adapters/helper/versions?limit=2")
    assert ([v["version"] for v in page["data"]], page["has_more"]) == ([1, 2], True)
    rest = learnt.alice.ok("GET", "/v1/adapters/helper/versions?limit=2&after=2")
    assert ([v["version"] for v in rest["data"]], rest["has_more"]) == ([3], False)
    assert [v["parent"] for v in page["data"] + rest["data"]] == [0, 1, 2]
    assert [v["live"] for v in page["data"] + rest["data"]] == [False, False, True]
    assert rest["data"][0]["standing_feedback"] == ["one", "two", "three"]


def test_going_back_and_on_from_there(learnt: Stack) -> None:
    learnt.learn("two")
    name = learnt.alice.adapter()["id"]
    answer = learnt.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1})
    assert (answer["live_version"], answer["head_version"]) == (1, 1)
    assert learnt.alice.says("helper").endswith(f"{name}-v1")
    assert learnt.alice.says("helper@v2").endswith(f"{name}-v2"), "the newer one can still be pinned"
    assert learnt.learn("three") == 3
    third = learnt.alice.ok("GET", "/v1/adapters/helper/versions/3")
    assert third["parent"] == 1
    assert third["standing_feedback"] == ["one", "three"]


def test_back_to_the_base_model(learnt: Stack) -> None:
    answer = learnt.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 0})
    assert (answer["live_version"], answer["head_version"]) == (0, 0)
    learnt.converge()
    assert learnt.alice.chat("helper")["model"] == "helper@v0"
    assert learnt.alice.says("helper") == "I am tiny/base"
    learnt.alice.feedback()
    assert learnt.worker.must_lease().parent is None


def test_promotions_that_cannot_be(learnt: Stack) -> None:
    before = learnt.alice.adapter()
    error_of(promote(learnt, 9), 404, "version_not_found")
    error_of(promote(learnt, -1), 422, "invalid_parameter")
    error_of(promote(learnt, 2**70), 422, "invalid_parameter")
    learnt.sql("UPDATE versions SET status = 'rejected', rejection = 'nan'")
    error_of(promote(learnt, 1), 422, "version_rejected")
    assert learnt.alice.adapter() == before


def test_a_promotion_without_an_engine_moves_nothing(learnt: Stack) -> None:
    learnt.learn("two")
    before = learnt.alice.adapter()
    sent = learnt.alice.feedback("three")
    lease = learnt.worker.must_lease()
    learnt.engine.down = True
    answer = promote(learnt, 1)
    error_of(answer, 503, "engine_unavailable")
    assert "retry-after" in answer.headers
    assert learnt.alice.adapter() == before | {"queued_jobs": 1}
    assert learnt.alice.job(sent["job_id"])["status"] == "running"
    learnt.engine.down = False
    assert learnt.worker.train(lease) == 3, "the run was not fenced either"


def test_a_promotion_that_the_engine_refuses_moves_nothing(learnt: Stack) -> None:
    learnt.learn("two")
    name = f"{learnt.alice.adapter()['id']}-v1"
    assert name not in learnt.engine.adapters, "drained and unloaded"
    learnt.engine.refused[name] = 500
    error_of(promote(learnt, 1), 422, "version_rejected")
    assert learnt.alice.adapter()["live_version"] == 2
    version = learnt.alice.ok("GET", "/v1/adapters/helper/versions/1")
    assert version["status"] == "published", "what was served once keeps its record"


def test_a_promotion_checks_the_files_again(learnt: Stack) -> None:
    learnt.learn("two")
    uri = learnt.rows("SELECT uri FROM versions WHERE n = 1")[0]["uri"]
    (learnt.root / uri / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    error_of(promote(learnt, 1), 422, "version_rejected")
    assert learnt.alice.adapter()["live_version"] == 2


def test_promoting_what_is_live_is_harmless(learnt: Stack) -> None:
    before = learnt.alice.adapter()
    assert learnt.alice.ok("POST", "/v1/adapters/helper/promote", {"version": 1}) == before
