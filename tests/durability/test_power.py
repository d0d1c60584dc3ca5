"""Power cuts, a share of `make check-power`; and that the check would notice a store that does not keep its word."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.durability import version_files
from tests.durability.disk import ROOT, Disk, Mark, Name, Sync, Truncate, Write
from tests.durability.power import check
from tests.durability.version_files import FILES
from worker import versions


def test_what_was_acknowledged_outlives_the_power() -> None:
    tally = check(200, seed=3)
    assert tally.faults == []
    assert tally.promises > 1000
    assert min(tally.fell["inside"], tally.fell["between"]) > 0, "the cuts fell on one side only"


@pytest.mark.slow
def test_what_was_acknowledged_outlives_three_thousand_cuts() -> None:
    tally = check(3000, seed=11)
    assert tally.faults == []
    assert tally.restarts > 20


@pytest.mark.parametrize(
    ("journals", "change"),
    [
        (("wal",), {"pragma": "synchronous=OFF"}),
        (("truncate",), {"pragma": "synchronous=OFF"}),
        (("wal",), {"pragma": "synchronous=NORMAL"}),  # SQLite's usual advice: safe from corruption, not from loss
        (("wal",), {"early": True}),
        (("truncate",), {"early": True}),
    ],
)
def test_a_store_that_promises_too_early_is_found_out(journals: tuple[str, ...], change: dict[str, object]) -> None:
    tally = check(120, seed=5, journals=journals, **change)
    assert any(fault.startswith(("lost", "corrupt")) for fault in tally.faults)


def test_versions_outlive_the_power(tmp_path: Path) -> None:
    counts = version_files.check(tmp_path, 1500, seed=2)
    assert (counts["lost"], counts["torn"]) == (0, 0)
    assert counts["promises"] > 1000


NEEDED = {
    "a file": lambda p: p.as_posix().endswith(tuple(FILES)),
    "a part's directory": lambda p: p.name in versions.PARTS,
    "the staging directory": lambda p: len(p.parts) == 2 and p.name.startswith(".tmp-"),
    "the adapter's directory after the rename": lambda p: len(p.parts) == 1,
    "the root after a new adapter": lambda p: p == Path(),
}


@pytest.mark.parametrize("which", NEEDED)
def test_every_one_of_a_version_s_syncs_is_needed(which: str, tmp_path: Path) -> None:
    counts = version_files.check(tmp_path, 300, seed=2, skip=NEEDED[which])
    assert counts["lost"] > 0
    assert (counts["torn"] > 0) == (
        which not in ("the adapter's directory after the rename", "the root after a new adapter")
    )


def test_sync_asks_the_kernel() -> None:
    """Which cannot sync this device, and says so."""
    with pytest.raises(OSError, match="Invalid argument"):
        versions.sync(Path("/dev/null"))


def test_a_synced_write_stays_and_others_may_go_or_tear() -> None:
    disk = Disk()
    for event in (Name(ROOT, {"a": 1}), Sync(ROOT), Write(1, 0, b"x" * 2048), Sync(1), Write(1, 0, b"y" * 2048)):
        disk.apply(event)
    chance = random.Random(1)  # noqa: S311 - repeatable, not secret
    found = {disk.cut(chance)["a"] for _ in range(200)}
    assert {b"x" * 2048, b"y" * 2048} < found
    assert all(content[i : i + 512] in (b"x" * 512, b"y" * 512) for content in found for i in range(0, 2048, 512))
    disk.apply(Sync(1))
    assert {disk.cut(chance)["a"] for _ in range(50)} == {b"y" * 2048}


def test_names_are_the_directory_s_and_a_rename_is_one_change() -> None:
    disk = Disk()
    for event in (Name(ROOT, {"old": 1}), Write(1, 0, b"x"), Sync(1), Sync(ROOT), Name(ROOT, {"old": None, "new": 1})):
        disk.apply(event)
    chance = random.Random(1)  # noqa: S311 - repeatable, not secret
    assert {tuple(disk.cut(chance)) for _ in range(50)} == {("old",), ("new",)}
    for event in (Sync(ROOT), Truncate(1, 0), Mark("nothing")):
        disk.apply(event)
    assert {disk.cut(chance)["new"] for _ in range(50)} == {b"", b"x"}
