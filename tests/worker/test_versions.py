"""Version directories: digest, durability order, immutability, leftovers."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from api_schemas.worker import FileEntry
from worker.versions import (
    clear_leftovers,
    create_staging,
    directory_of,
    discard,
    publish,
    scan,
    staging_of,
    version_digest,
)

FILES = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"weights", "trainer/o.json": b"1"}


def staged(root: Path, run_id: str = "run_1", token: int = 1, **changed: bytes) -> Path:
    staging = staging_of(root, "adp", run_id, token)
    create_staging(staging)
    for name, content in FILES.items():
        (staging / name).write_bytes(changed.get(name.split("/")[1].split(".")[0], content))
    return staging


def test_digest_is_the_documented_formula(tmp_path: Path) -> None:
    files = publish(staged(tmp_path), tmp_path / "adp" / "run_1")
    by_hand = "".join(f"{n} {len(b)} {hashlib.sha256(b).hexdigest()}\n" for n, b in sorted(FILES.items()))
    assert version_digest(files) == "sha256:" + hashlib.sha256(by_hand.encode()).hexdigest()
    assert version_digest(reversed(files)) == version_digest(files)


@pytest.mark.parametrize("change", ["name", "size", "sha256"])
def test_digest_sees_every_field(change: str) -> None:
    entry = FileEntry(name="adapter/a", size=1, sha256="0" * 64)
    other = entry.model_copy(update={change: {"name": "trainer/a", "size": 2, "sha256": "1" * 64}[change]})
    assert version_digest([entry]) != version_digest([other])


def test_publishing_moves_everything_at_once(tmp_path: Path) -> None:
    staging, final = staged(tmp_path), tmp_path / "adp" / "run_1"
    files = publish(staging, final)
    assert not staging.exists()
    assert {f.name: (final / f.name).read_bytes() for f in files} == FILES
    assert scan(final) == files


def test_everything_is_synced_before_the_rename_and_the_name_after_it(tmp_path: Path) -> None:
    staging, final = staged(tmp_path), tmp_path / "adp" / "run_1"
    before: list[str] = []
    after: list[Path] = []

    def note(path: Path) -> None:
        if final.exists():
            after.append(path)
        else:
            before.append(path.relative_to(staging).as_posix())

    publish(staging, final, sync=note)
    assert sorted(before) == sorted([*FILES, "adapter", "trainer", "."])
    assert max(before.index(f) for f in FILES) < min(before.index(d) for d in ("adapter", "trainer", "."))
    assert after == [final.parent]


WRITER = """
import itertools, pathlib, sys
from worker.versions import create_staging, directory_of, publish, staging_of
root = pathlib.Path(sys.argv[1])
for n in itertools.count(int(sys.argv[2])):
    staging = staging_of(root, "adp", f"run_{n}", n)
    create_staging(staging)
    for part in ("adapter", "trainer"):
        for file in range(3):
            (staging / part / f"f{file}").write_bytes(f"{n} {file} ".encode() * 2000)
    publish(staging, directory_of(root, f"adp/run_{n}"))
    print(n, flush=True)
"""


def test_a_version_is_whole_or_absent_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311 - repeatable, not secret
    leftovers, start = 0, 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(start)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        ) as writer:  # fmt: skip
            assert writer.stdout is not None
            told = [int(writer.stdout.readline()) for _ in range(chance.randint(1, 4))]
            threading.Event().wait(chance.uniform(0, 0.01))  # a moment inside the next version, whichever it is
            writer.kill()
            told += [int(line) for line in writer.stdout]
        present = {int(p.name[4:]) for p in (tmp_path / "adp").glob("run_*")}
        assert present >= set(told), "acknowledged and gone"
        for number in present - set(range(start)):
            files = {f.name: (tmp_path / "adp" / f"run_{number}" / f.name).read_bytes()
                     for f in scan(tmp_path / "adp" / f"run_{number}")}  # fmt: skip
            assert files == {
                f"{part}/f{n}": f"{number} {n} ".encode() * 2000 for part in ("adapter", "trainer") for n in range(3)
            }
        leftovers += len(list((tmp_path / "adp").glob(".tmp-*")))
        start = max(present) + 1
        clear_leftovers(tmp_path, "adp", token=start)
        assert not list((tmp_path / "adp").glob(".tmp-*"))
    assert leftovers > 0, "no kill fell inside a version: the test proved nothing"


def test_a_second_try_with_the_same_bytes_keeps_the_first(tmp_path: Path) -> None:
    final = tmp_path / "adp" / "run_1"
    first = publish(staged(tmp_path), final)
    inode = final.stat().st_ino
    assert publish(staged(tmp_path), final) == first
    assert final.stat().st_ino == inode
    assert [p.name for p in final.parent.iterdir()] == ["run_1"]


def test_a_version_is_never_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "adp" / "run_1"
    publish(staged(tmp_path), final)
    with pytest.raises(FileExistsError):
        publish(staged(tmp_path, adapter_model=b"other"), final)
    assert (final / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_does_not_belong_into_a_version_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "adp" / "run_1"
    publish(staged(tmp_path), final)
    link = final / "adapter" / "README.md"
    link.symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="not a plain file"):
        scan(final)
    link.unlink()
    (final / "extra").write_text("?")
    with pytest.raises(ValueError, match="does not belong"):
        scan(final)


@pytest.mark.parametrize("uri", ["../x", "a", "a/b/c", "/etc/passwd", "a/..", "a/", "a/b\n", ".tmp-1/x"])
def test_a_place_outside_the_root_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="place"):
        directory_of(tmp_path, uri)


def test_leftovers_of_older_runs_go_and_newer_ones_stay(tmp_path: Path) -> None:
    publish(staged(tmp_path, "run_0", 0), tmp_path / "adp" / "run_0")
    for run_id, token in (("run_1", 1), ("run_2", 2), ("run_3", 3)):
        staged(tmp_path, run_id, token)
    (tmp_path / "adp" / ".tmp-mine").mkdir()
    clear_leftovers(tmp_path, "adp", token=2)
    assert sorted(p.name for p in (tmp_path / "adp").iterdir()) == [".tmp-3.run_3", ".tmp-mine", "run_0"]
    clear_leftovers(tmp_path, "unknown", token=2)


def test_discarding_a_run_leaves_what_may_be_committed(tmp_path: Path) -> None:
    final = tmp_path / "adp" / "run_1"
    publish(staged(tmp_path), final)
    staged(tmp_path)
    discard(tmp_path, "adp", "run_1", 1, published=False)
    assert [p.name for p in final.parent.iterdir()] == ["run_1"]
    discard(tmp_path, "adp", "run_1", 1, published=True)
    assert list(final.parent.iterdir()) == []
