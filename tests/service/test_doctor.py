"""Each damage is planted, found under its own name, and set right or named for a person."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from service.cli import app
from service.doctor import engines
from service.doctor.examine import examine
from service.doctor.findings import Finding
from tests.service import peft_files
from tests.service.harness import Json, Stack

Plant = Callable[[Stack], None]


def look(stack: Stack, grace: float = 0.0) -> list[Finding]:
    return list(examine(stack.context.database, stack.context.settings, grace=grace, with_engines=False))


def codes(findings: list[Finding]) -> list[str]:
    return [f.code for f in findings]


@pytest.fixture
def taught(helper: Stack) -> Stack:
    """Three versions, of which the third is live; one job waits."""
    for remark in ("one", "two", "three"):
        helper.learn(remark)
    helper.alice.feedback("waits")
    for path in (helper.context.settings.data_dir, *helper.context.settings.data_dir.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o022)
    return helper


def uri(stack: Stack, n: int) -> Path:
    (row,) = stack.rows("SELECT uri FROM versions WHERE n = :n", n=n)
    return stack.root / str(row["uri"])


def age(*paths: Path) -> None:
    """As if nothing had been written there for a day."""
    for path in paths:
        for p in (*path.rglob("*"), path):
            os.utime(p, (p.stat().st_atime, p.stat().st_mtime - 86400))


def make_directory(stack: Stack, name: str, adapter: str | None = None) -> Path:
    path = stack.root / (adapter or stack.alice.adapter()["id"]) / name
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    return path


def garble(path: Path) -> None:
    """One bit of the last byte."""
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)


def garble_name(version: Path) -> None:
    (version / "adapter" / "tokenizer.json").write_text("{}")


def run_elsewhere(stack: Stack, state: str) -> str:
    stack.sql(
        "INSERT INTO runs (id, adapter_id, token, worker_id, parent_n, seed, state, started_at, ended_at)"
        " SELECT 'run_feed', id, 900, 'w', 0, 0, :state, 1.0, 2.0 FROM adapters",
        state=state,
    )
    stack.sql("UPDATE adapters SET token = 900")
    return "run_feed"


def test_a_service_in_use_is_well(taught: Stack) -> None:
    taught.worker.must_lease()
    assert look(taught) == []


def sql(*statements: str) -> Plant:
    return lambda stack: [stack.sql(statement) for statement in statements] and None


ROWS: dict[str, tuple[str, Plant]] = {
    "alias to nowhere": ("live_unusable", sql("UPDATE adapters SET next_n = 99, live_n = 98")),
    "head to nowhere": ("head_unusable", sql("UPDATE adapters SET next_n = 99, head_n = 98")),
    "live version rejected": ("live_unusable", sql("UPDATE versions SET status = 'rejected' WHERE n = 3")),
    "head without files": ("head_unusable", sql("UPDATE versions SET files_doomed_at = 1.0 WHERE n = 3")),
    "jobs miscounted": ("open_jobs_wrong", sql("UPDATE adapters SET open_jobs = 7")),
    "version numbers run back": ("next_n_behind", sql("UPDATE adapters SET head_n = 1, live_n = 1, next_n = 2")),
    "sequence runs back": ("next_seq_behind", sql("UPDATE adapters SET next_seq = 1")),
    "token runs back": ("token_behind", sql("UPDATE adapters SET token = 1")),
    "lease of no run": ("lease_dangling", sql("UPDATE adapters SET lease_run = 'x', lease_until = 1.0")),
    "run without lease": ("run_without_lease", sql("UPDATE runs SET state = 'running' WHERE token = 2")),
    "job without run": ("job_without_run", sql("UPDATE jobs SET state = 'running' WHERE state = 'queued'")),
    "applied and not ended": (
        "applied_and_not_ended", sql("UPDATE jobs SET state = 'cancelled', version_n = NULL WHERE version_n = 2"),
    ),
    "accepted and lost": (
        "batch_without_job",
        sql(
            "DELETE FROM events", "DELETE FROM jobs WHERE state = 'queued'", "UPDATE adapters SET open_jobs = 0",
        ),
    ),
    "erased and not scrubbed": ("scrub_due", sql("INSERT INTO chores (name, wanted_at) VALUES ('scrub', 1.0)")),
}  # fmt: skip


@pytest.mark.parametrize("damage", sorted(ROWS))
def test_a_row_that_leads_nowhere_is_found_and_set_right(taught: Stack, damage: str) -> None:
    code, plant = ROWS[damage]
    plant(taught)
    found = [f for f in look(taught) if f.code == code]
    assert len(found) == 1, codes(look(taught))
    assert code in codes(look(taught)), "looking changes nothing"
    for finding in look(taught):
        if finding.repair is not None:
            finding.repair()
    assert codes(look(taught)) == []
    taught.converge()
    assert taught.alice.chat()["choices"][0]["finish_reason"] == "stop"
    leased = taught.worker.lease()
    assert leased is not None, "the queue goes on"
    assert taught.worker.train(leased) >= 4


def test_a_lease_that_a_wrong_clock_granted_ends_in_time(taught: Stack) -> None:
    lease = taught.worker.must_lease()
    taught.sql("UPDATE adapters SET lease_until = lease_until + 1000000")
    (finding,) = look(taught)
    assert finding.code == "lease_too_long"
    assert finding.repair is not None
    finding.repair()
    assert look(taught) == []
    assert taught.worker.call(lease, "heartbeat").status_code == 200, "its worker keeps it"


NAMED: dict[str, tuple[str, Plant]] = {
    "a parent that is no older": ("parent_wrong", sql("UPDATE versions SET parent_n = 3 WHERE n = 2")),
    "a success that no version applied": (
        "succeeded_and_not_applied", sql("DELETE FROM applications WHERE version_n = 2"),
    ),
    "a batch applied twice on one line": (
        "applied_twice",
        sql("UPDATE jobs SET batch_id = (SELECT batch_id FROM jobs WHERE version_n = 1) WHERE version_n = 2"),
    ),
    "a damaged live version": ("files_damaged", lambda s: garble(uri(s, 3) / "adapter" / "adapter_model.safetensors")),
    "a list of files that is not the committed one": (
        "files_damaged", sql("UPDATE versions SET digest = 'sha256:0' WHERE n = 3"),
    ),
    "a live version without its directory": ("files_damaged", lambda s: shutil.rmtree(uri(s, 3))),
    "a file too many": ("files_damaged", lambda s: garble_name(uri(s, 3))),
}  # fmt: skip


@pytest.mark.parametrize("damage", sorted(NAMED))
def test_what_no_program_can_know_is_named_for_a_person(taught: Stack, damage: str) -> None:
    code, plant = NAMED[damage]
    plant(taught)
    found = [f for f in look(taught) if f.code == code]
    assert len(found) >= 1, codes(look(taught))
    assert all(f.repair is None for f in found)


def test_a_damaged_version_that_nothing_points_to_is_given_up(taught: Stack) -> None:
    garble(uri(taught, 1) / "trainer" / "optimizer.safetensors")
    (finding,) = look(taught)
    assert (finding.code, finding.subject[-3:]) == ("files_damaged", " v1")
    assert finding.repair is not None
    finding.repair()
    taught.converge()
    assert look(taught) == []
    assert taught.alice.ok("GET", "/v1/adapters/helper/versions/1")["files"] == "removed"


def test_the_adapters_directory_may_be_away(taught: Stack) -> None:
    taught.root.rename(taught.root.with_name("elsewhere"))
    assert codes(look(taught)) == ["adapters_missing"]


ORPHANS: dict[str, Callable[[Stack], Path]] = {
    "of no run": lambda s: make_directory(s, "run_0123"),
    "of a run that failed": lambda s: make_directory(s, run_elsewhere(s, "failed")),
    "of a run that was lost": lambda s: make_directory(s, run_elsewhere(s, "lost")),
    "what a run left unfinished": lambda s: make_directory(s, f".tmp-900.{run_elsewhere(s, 'superseded')}"),
    "half removed": lambda s: make_directory(s, ".gone-run_0123"),
    "of an adapter that does not exist": lambda s: make_directory(s, "run_0123", "adp_0123"),
}


@pytest.mark.parametrize("kind", sorted(ORPHANS))
def test_a_directory_that_nothing_refers_to_goes_when_it_is_old(taught: Stack, kind: str) -> None:
    path = ORPHANS[kind](taught)
    assert look(taught, grace=3600.0) == [], "it may be about to be committed"
    age(path)
    first = look(taught, grace=3600.0)
    assert codes(first) == ["orphan_directory"]
    assert first[0].repair is not None
    first[0].repair()
    assert not path.exists()
    age(path.parent)
    for finding in look(taught, grace=3600.0):  # the empty directory of an adapter that is not there
        assert finding.code == "unknown_adapter"
        assert finding.repair is not None
        finding.repair()
    assert look(taught, grace=0.0) == []
    assert all(uri(taught, n).is_dir() for n in (1, 2, 3))


def test_the_service_takes_orphans_away_by_itself(taught: Stack) -> None:
    old, young = make_directory(taught, "run_0123"), make_directory(taught, "run_4567")
    age(old)
    taught.context.publisher._retention._look_again = 0.0
    taught.converge()
    assert (old.exists(), young.exists()) == (False, True)
    assert all(uri(taught, n).is_dir() for n in (1, 2, 3))


def test_a_run_that_goes_on_keeps_its_directory_however_old(taught: Stack) -> None:
    lease = taught.worker.must_lease()
    directory = peft_files.write_version(taught.root, lease)
    age(directory)
    assert look(taught, grace=3600.0) == []
    assert taught.worker.commit(lease, peft_files.manifest(directory)).status_code == 200
    assert look(taught, grace=3600.0) == []


def test_a_directory_that_was_committed_between_look_and_removal_stays(taught: Stack) -> None:
    """The upload's way: its run is written only with its version."""
    version = make_directory(taught, "run_0123")
    age(version)
    (orphan,) = look(taught, grace=3600.0)
    run_elsewhere(taught, "committed")
    taught.sql("UPDATE runs SET id = 'run_0123' WHERE id = 'run_feed'")
    taught.sql("UPDATE versions SET run_id = 'run_0123' WHERE n = 2")
    assert orphan.repair is not None
    orphan.repair()
    assert version.is_dir()


def test_what_others_may_read_or_write_is_closed(taught: Stack) -> None:
    data = taught.context.settings.data_dir
    weights = uri(taught, 2) / "adapter" / "adapter_model.safetensors"
    (data / "worker.key").write_text("x")
    for path, mode in (
        (data / "server.secret", 0o644), (data / "worker.key", 0o640), (data / "perennial.db", 0o666), (weights, 0o666),
    ):  # fmt: skip
        path.chmod(mode)
    found = look(taught)
    assert sorted(codes(found)) == ["secret_readable"] * 2 + ["writable_by_all"] * 2
    for finding in found:
        assert finding.repair is not None
        finding.repair()
    assert look(taught) == []


def test_archives_of_nothing_go(taught: Stack) -> None:
    taught.alice.get("/v1/adapters/helper/versions/1/download")
    stray = taught.context.settings.archives_root / ("0" * 64 + ".zip")
    stray.write_bytes(b"x")
    (finding,) = look(taught)
    assert (finding.code, finding.subject) == ("orphan_archive", str(stray))
    assert finding.repair is not None
    finding.repair()
    assert look(taught) == []


def test_a_damaged_database_is_named(taught: Stack) -> None:
    taught.context.database.rewrite([])  # all of it in one file
    path = taught.context.settings.data_dir / "perennial.db"
    body = bytearray(path.read_bytes())
    (page,) = taught.rows("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'run_steps' AND type = 'index'")
    start = (int(page["rootpage"]) - 1) * 4096
    body[start + 100 : start + 4096] = b"\x00" * 3996
    path.write_bytes(body)
    taught.context.database.engine.dispose()  # the doctor is a process of its own: no page is in its memory yet
    assert "database_damaged" in codes(look(taught))


def engine_answers(stack: Stack, models: Json | None) -> list[Finding]:
    """What is found when every engine says this; None: it does not answer."""

    def get(url: str, **_: Any) -> httpx2.Response:
        request = httpx2.Request("GET", url)
        if models is None:
            raise httpx2.ConnectError("refused", request=request)
        data = [{"id": name, "root": root} for name, root in models.items()]
        return httpx2.Response(200, json={"data": data}, request=request)

    return list(engines.check(stack.context.database, stack.context.settings, get=get))


def test_engines_are_held_to_the_database(taught: Stack) -> None:
    base, live = {peft_files.BASE: "/models/x"}, taught.served(3)
    place = f"{uri(taught, 3)}/adapter"
    stray = {"adp_0-v1": f"{taught.root}/adp_0/run_1/adapter", "adp_1-v1": "/another/service"}
    for models, wanted in (
        (base | {live: place}, []),
        (None, ["engine_away"]),
        ({live: place}, ["base_not_served"]),
        (base, ["live_not_loaded"]),
        (base | {live: place} | stray, ["unknown_loaded"]),
        (base | {live: f"{uri(taught, 2)}/adapter"}, ["wrong_files_loaded"]),
    ):
        assert codes(engine_answers(taught, models)) == wanted


def test_the_command_changes_nothing_unless_told_and_says_how_it_went(taught: Stack) -> None:
    taught.sql("UPDATE adapters SET open_jobs = 7")
    settings = taught.context.settings
    runner = CliRunner(env={"PERENNIAL_DATA_DIR": str(settings.data_dir), "PERENNIAL_BASE_MODEL": peft_files.BASE})
    plain = runner.invoke(app, ["doctor", "--no-engines"])
    assert (plain.exit_code, "open_jobs_wrong" in plain.output) == (1, True)
    told = runner.invoke(app, ["doctor", "--no-engines", "--json"])
    body = json.loads(told.output)
    assert (told.exit_code, body["ok"]) == (1, False)
    (finding,) = body["findings"]
    assert (finding["code"], finding["repairable"], finding["repaired"]) == ("open_jobs_wrong", True, False)
    mended = runner.invoke(app, ["doctor", "--no-engines", "--repair"])
    assert (mended.exit_code, "repaired" in mended.output) == (0, True)
    well = runner.invoke(app, ["doctor", "--no-engines"])
    assert (well.exit_code, well.output) == (0, "All is well.\n")


def test_the_command_says_when_it_cannot_look(tmp_path: Path) -> None:
    behind = CliRunner(env={"PERENNIAL_DATA_DIR": str(tmp_path)}).invoke(app, ["doctor"])
    assert (behind.exit_code, "perennial migrate" in behind.output) == (1, True)
    away = {"PERENNIAL_DATA_DIR": str(tmp_path), "PERENNIAL_DATABASE_URL": f"sqlite:///{tmp_path}/no/such/place.db"}
    answer = CliRunner(env=away).invoke(app, ["doctor"])
    assert answer.exit_code == 2
    assert "Traceback" not in answer.output


def test_everything_of_one_tenant_is_erased_at_the_operators_word(taught: Stack) -> None:
    taught.alice.chat()
    data = taught.context.settings.data_dir
    runner = CliRunner(env={"PERENNIAL_DATA_DIR": str(data)})
    assert runner.invoke(app, ["erase-tenant", "alice"]).exit_code == 1
    assert runner.invoke(app, ["erase-tenant", "nobody", "--yes"]).exit_code == 1
    done = runner.invoke(app, ["erase-tenant", "alice", "--yes"])
    assert done.exit_code == 0, done.output
    assert taught.count("rollouts") == 0
    assert taught.rows("SELECT DISTINCT feedback FROM feedback_items") == [{"feedback": ""}]
    assert taught.alice.get("/v1/adapters").status_code == 401
    taught.converge()
    taught.converge()
    assert list(taught.root.glob("adp_*")) == []
    assert b"pear" not in (data / "perennial.db").read_bytes()
