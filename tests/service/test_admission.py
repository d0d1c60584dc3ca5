"""What a version must be before an engine sees it. Each fault is refused by name, ends its job and moves nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry, Lease
from service import admission
from service.errors import VersionRejected
from tests.service import peft_files
from tests.service.harness import LORA, Stack, error_of

LORA_SETTINGS = LoraSettings.model_validate(LORA)
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Arrays = peft_files.Arrays


def weights(directory: Path, change: Callable[[Arrays], object]) -> None:
    arrays = peft_files.tensors(LORA_SETTINGS)
    change(arrays)
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(peft_files.encode(arrays))


def first(array: np.ndarray, value: float | int) -> np.ndarray:
    """A copy with the last number replaced: faults hide at ends."""
    made = array.copy()
    made.flat[-1] = value
    return made


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter" / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def header(text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return raw(lambda _: peft_files.with_header(content, b"\x00" * 64))


def config(**changes: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        made = peft_files.config(LORA_SETTINGS) | changes
        (directory / "adapter" / "adapter_config.json").write_text(json.dumps(made))

    return apply


def tensors(change: Callable[[Arrays], object]) -> Callable[[Path], None]:
    return lambda directory: weights(directory, change)


def bits(array: np.ndarray, value: int) -> np.ndarray:
    """bfloat16 bit patterns, all 1.0 but the last."""
    return first(np.full(array.shape, 0x3F80, np.uint16), value)


def link(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        target = directory.parent.parent / f"outside-{directory.name}"
        (directory / name).rename(target)
        (directory / name).symlink_to(target)

    return apply


def config_text(text: bytes) -> Callable[[Path], object]:
    return lambda d: (d / "adapter" / "adapter_config.json").write_bytes(text)


BEFORE_MANIFEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (tensors(lambda t: t.update({Q_A: first(t[Q_A], np.nan)})), "not_finite"),
    "inf": (tensors(lambda t: t.update({Q_A: first(t[Q_A], -np.inf)})), "not_finite"),
    "half nan": (tensors(lambda t: t.update({Q_A: first(t[Q_A].astype(np.float16), np.nan)})), "not_finite"),
    "bf16 nan": (tensors(lambda t: t.update({Q_A: bits(t[Q_A], 0x7FC1)})), "not_finite"),
    "bf16 inf": (tensors(lambda t: t.update({Q_A: bits(t[Q_A], 0xFF80)})), "not_finite"),
    "wrong shape": (tensors(lambda t: t.update({Q_A: t[Q_A].T.copy()})), "wrong_shape"),
    "flat shape": (tensors(lambda t: t.update({Q_A: t[Q_A].ravel()})), "wrong_shape"),
    "other rank": (tensors(lambda t: t.update({Q_A: np.zeros((3, 8), np.float32)})), "wrong_shape"),
    "extra key": (tensors(lambda t: t.update({Q_A.replace("q_proj", "x_proj"): t[Q_A]})), "extra_keys"),
    "other layer": (tensors(lambda t: t.update({Q_A.replace("layers.0", "layers.1"): t[Q_A]})), "extra_keys"),
    "missing key": (tensors(lambda t: t.pop(Q_A)), "missing_keys"),
    "no keys": (tensors(lambda t: t.clear()), "missing_keys"),
    "float64": (tensors(lambda t: t.update({Q_A: t[Q_A].astype(np.float64)})), "wrong_dtype"),
    "integers": (tensors(lambda t: t.update({Q_A: t[Q_A].astype(np.int64)})), "wrong_dtype"),
    "truncated": (raw(lambda b: b[:-1]), "bad_file"),
    "trailing bytes": (raw(lambda b: b + b"\x00"), "bad_file"),
    "empty": (raw(lambda _: b""), "bad_file"),
    "seven bytes": (raw(lambda b: b[:7]), "bad_file"),
    "a pickle": (raw(lambda _: b"\x80\x04\x95" + b"0" * 100), "pickle: protocol 4"),
    "a zip": (raw(lambda _: b"PK\x03\x04" + b"0" * 100), "archive: a zip file"),
    "a tar": (raw(lambda _: (b"adapter/x" + b"\x00" * 248 + b"ustar").ljust(1024, b"\x00")), "archive: a tar file"),
    "huge": (tensors(lambda t: t.update({Q_A: first(t[Q_A], 1e30)})), "too_large"),
    "header bomb": (raw(lambda b: (2**62).to_bytes(8, "little") + b[8:]), "bad_file"),
    "header too long": (header(b" " * (2**20 + 1)), "bad_file"),
    "deep header": (header("[" * 100_000), "bad_file"),
    "header not json": (header("{,}"), "bad_file"),
    "header not utf-8": (header(b'{"\xff": 1}'), "bad_file"),
    "header a list": (header("[1]"), "bad_file"),
    "entry a number": (header('{"a": 1}'), "bad_file"),
    "infinite shape": (header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 64]}}'), "bad_file"),
    "infinite offset": (header('{"a": {"dtype": "I8", "shape": [64], "data_offsets": [0, Infinity]}}'), "bad_file"),
    "negative offset": (header('{"a": {"dtype": "I8", "shape": [64], "data_offsets": [-8, 64]}}'), "bad_file"),
    "overlap": (
        header(
            '{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},'
            ' "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}'
        ),
        "bad_file",
    ),
    "hole": (header('{"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}'), "bad_file"),
    "huge shape": (header('{"a": {"dtype": "F32", "shape": [4611686018427387], "data_offsets": [0, 1]}}'), "bad_file"),
    "dora": (config(use_dora=True), "unsupported: use_dora"),
    "rslora": (config(use_rslora=True), "unsupported: use_rslora"),
    "bias": (config(bias="all"), "unsupported: bias"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "unsupported: modules_to_save"),
    "rank_pattern": (config(rank_pattern={"q_proj": 64}), "unsupported: rank_pattern"),
    "auto_map": (config(auto_map={"x": "evil.py"}), "unsupported: auto_map"),
    "lora_bias": (config(lora_bias=True), "unsupported: lora_bias"),
    "fan_in_fan_out": (config(fan_in_fan_out=True), "unsupported: fan_in_fan_out"),
    "wrong base": (config(base_model_name_or_path="other/base"), "wrong_base"),
    "wrong rank": (config(r=3), "wrong_rank"),
    "wrong alpha": (config(lora_alpha=400), "wrong_rank"),
    "wrong modules": (config(target_modules=["q_proj"]), "wrong_modules"),
    "modules a word": (config(target_modules="all-linear"), "wrong_modules"),
    "modules a number": (config(target_modules=5), "wrong_modules"),
    "modules mixed": (config(target_modules=["q_proj", 5, None]), "wrong_modules"),
    "another method": (config(peft_type="IA3"), "bad_config"),
    "config not json": (config_text(b"{"), "bad_config"),
    "config a list": (config_text(b"[]"), "bad_config"),
    "config deep": (config_text(b"[" * 60_000), "bad_config"),
    "config huge": (config_text(b" " * 70_000), "missing_file"),
    "no config": (lambda d: (d / "adapter" / "adapter_config.json").unlink(), "missing_file"),
    "no weights": (lambda d: (d / "adapter" / "adapter_model.safetensors").unlink(), "missing_file"),
    "a pickle beside": (lambda d: (d / "adapter" / "adapter_model.bin").write_bytes(b"x"), "wrong_files"),
    "a tokenizer beside": (lambda d: (d / "adapter" / "tokenizer_config.json").write_text("{}"), "wrong_files"),
    "linked weights": (link("adapter/adapter_model.safetensors"), "wrong_checksum"),
}  # fmt: skip
"""Name -> (what is done to a good version, the word that the refusal starts with)."""

AFTER_MANIFEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed since": (raw(lambda b: b[:-1] + b"\x01"), "wrong_checksum"),
    "grown since": (raw(lambda b: b + b"\x01"), "wrong_checksum"),
    "file gone": (lambda d: (d / "adapter" / "README.md").unlink(), "wrong_files"),
    "extra file": (lambda d: (d / "adapter" / "perennial.json").write_text("{}"), "wrong_files"),
    "hidden deep file": (lambda d: (d / "trainer" / "x").mkdir() or (d / "trainer" / "x" / "y").touch(), "wrong_files"),
    "linked directory": (link("trainer"), "wrong_files"),
    "a pipe": (
        lambda d: (d / "trainer" / "state.json").unlink() or os.mkfifo(d / "trainer" / "state.json"),
        "wrong_checksum",
    ),
}
CASES = [
    *((name, fault, reason, False) for name, (fault, reason) in BEFORE_MANIFEST.items()),
    *((name, fault, reason, True) for name, (fault, reason) in AFTER_MANIFEST.items()),
]


def refused(stack: Stack, fault: Callable[[Path], object], reason: str, *, late: bool) -> None:
    """One version with one fault: 422, its job failed with the reason, and the adapter as it was."""
    sent = stack.alice.feedback()
    before = stack.alice.adapter()
    lease = stack.worker.must_lease()
    directory = peft_files.write_version(stack.root, lease)
    if not late:
        fault(directory)
    files = peft_files.manifest(directory)
    if late:
        fault(directory)
    error = error_of(stack.worker.commit(lease, files), 422, "version_rejected")
    assert error["message"].startswith(reason), error["message"]
    job = stack.alice.job(sent["job_id"])
    assert (job["status"], job["error"]) == ("failed", {"code": "version_rejected", "message": error["message"]})
    assert stack.alice.adapter() == before | {"queued_jobs": 0}
    assert stack.worker.lease() is None


def test_every_kind_of_bad_version_is_refused_by_name(stack: Stack) -> None:
    stack.alice.create()
    assert stack.worker.train(_after_feedback(stack)) == 1, "the same files without a fault are taken"
    stack.converge()
    loads = list(stack.engine.events)
    for name, fault, reason, late in CASES:
        try:
            refused(stack, fault, reason, late=late)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    stack.converge()
    assert stack.engine.events == loads, "no engine has seen any of them"
    assert stack.alice.says("helper").endswith("-v1")


def _after_feedback(stack: Stack) -> Lease:
    stack.alice.feedback()
    return stack.worker.must_lease()


def test_a_version_elsewhere_is_refused(stack: Stack) -> None:
    stack.alice.create()
    stack.alice.create("other")
    stack.alice.feedback()
    stack.alice.feedback(adapter="other")
    mine, other = stack.worker.must_lease(), stack.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(stack.root, other))
    answer = stack.worker.commit(mine, files, uri=f"{other.adapter_id}/{other.run_id}")
    assert error_of(answer, 422, "version_rejected")["message"].startswith("wrong_uri")
    for uri in ("../x", "/etc/x", "a/b/c", "a"):
        error_of(stack.worker.commit(other, files, uri=uri), 422, "invalid_parameter")
    stack.worker.caller.post(f"/worker/v1/runs/{other.run_id}/release", {"token": other.token})


def test_a_linked_directory_is_refused(stack: Stack) -> None:
    stack.alice.create()
    lease = _after_feedback(stack)
    directory = peft_files.write_version(stack.root, lease)
    files = peft_files.manifest(directory)
    directory.rename(stack.root / "elsewhere")
    directory.symlink_to(stack.root / "elsewhere")
    error = error_of(stack.worker.commit(lease, files), 422, "version_rejected")
    assert error["message"].startswith("wrong_files")


def test_a_manifest_that_names_a_file_twice_is_refused(stack: Stack) -> None:
    stack.alice.create()
    lease = _after_feedback(stack)
    files = peft_files.manifest(peft_files.write_version(stack.root, lease))
    error = error_of(stack.worker.commit(lease, [*files, files[0]]), 422, "version_rejected")
    assert error["message"].startswith("wrong_files")


def test_half_precision_is_taken(stack: Stack) -> None:
    stack.alice.create()
    for change in (
        lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}),
        lambda t: t.update({k: np.full(v.shape, 0x3F80, np.uint16) for k, v in t.items()}),
    ):
        lease = _after_feedback(stack)
        directory = peft_files.write_version(stack.root, lease)
        weights(directory, change)
        assert stack.worker.commit(lease, peft_files.manifest(directory)).status_code == 200


def test_the_digest_is_of_names_sizes_and_checksums() -> None:
    a = FileEntry(name="adapter/a", size=1, sha256="0" * 64)
    b = FileEntry(name="trainer/b", size=22, sha256="f" * 64)
    lines = f"adapter/a 1 {'0' * 64}\ntrainer/b 22 {'f' * 64}\n"
    wanted = f"sha256:{sha256(lines.encode()).hexdigest()}"
    assert admission.version_digest([b, a]) == admission.version_digest([a, b]) == wanted


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_and_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes over any part of a good file: read as before, or VersionRejected; nothing else."""
    good = peft_files.encode(peft_files.tensors(LORA_SETTINGS))
    at = data.draw(st.integers(0, 400))
    patch = data.draw(st.binary(max_size=40))
    path = tmp_path / "a.safetensors"
    path.write_bytes(good[:at] + patch + good[at + data.draw(st.integers(0, 40)) :])
    try:
        found = admission.read_header(path)
    except VersionRejected:
        return
    assert sum(e.end - e.begin for e in found.values()) <= path.stat().st_size
