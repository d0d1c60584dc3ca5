"""Adapters from elsewhere: two files in, one version out; what is bad is refused by name and changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_schemas.training import LoraSettings
from api_schemas.worker import FileEntry
from service import admission, uploads
from service.errors import BadRequest, TooLarge, VersionRejected
from tests.service import peft_files
from tests.service.harness import LORA, Json, Stack, error_of

SETTINGS = LoraSettings.model_validate(LORA)
URL = "/v1/adapters/helper/upload"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def config(**changes: object) -> bytes:
    return json.dumps(peft_files.config(SETTINGS, **changes)).encode()


def weights(value: float = 0.25, lora: LoraSettings = SETTINGS, **extra: np.ndarray) -> bytes:
    return peft_files.encode(peft_files.tensors(lora, value) | extra)


def put(stack: Stack, name: str, body: bytes) -> httpx2.Response:
    return stack.alice.request("PUT", f"{URL}/{name}", content=body)


def commit(stack: Stack, config_body: bytes, weights_body: bytes) -> httpx2.Response:
    body = {
        "config_sha256": hashlib.sha256(config_body).hexdigest(),
        "weights_sha256": hashlib.sha256(weights_body).hexdigest(),
    }
    return stack.alice.post(f"{URL}/commit", body)


def upload(stack: Stack, weights_body: bytes, config_body: bytes | None = None) -> Json:
    """Both files and the commit, which must be taken."""
    config_body = config_body or config()
    for name, body in ((CONFIG, config_body), (WEIGHTS, weights_body)):
        answer = put(stack, name, body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["name"], told["size_bytes"]) == (name, len(body))
        assert told["sha256"] == hashlib.sha256(body).hexdigest()
    answer = commit(stack, config_body, weights_body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_two_files_become_the_next_version_and_are_served(helper: Stack) -> None:
    helper.learn("one")
    version = upload(helper, weights())
    assert (version["version"], version["parent"], version["source"]) == (2, 1, "upload")
    assert version["standing_feedback"] == ["one"], "what was said before still stands"
    assert (version["batch_ids"], version["status"]) == ([], "pending")
    helper.converge()
    assert helper.alice.says("helper").endswith("-v2")
    assert helper.alice.adapter()["head_version"] == 2


def test_engines_get_our_config_and_never_theirs(helper: Stack) -> None:
    upload(helper, weights(), config(task_type="SEQ_CLS", inject="evil", revision="x", lora_dropout=0.5))
    (row,) = helper.rows("SELECT uri FROM versions")
    directory = helper.root / row["uri"]
    assert sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()) == [
        "adapter/README.md",
        f"adapter/{CONFIG}",
        f"adapter/{WEIGHTS}",
        "adapter/perennial.json",
    ]
    ours = json.loads((directory / "adapter" / CONFIG).read_text())
    assert ours.keys() & {"inject", "revision"} == set()
    assert (ours["task_type"], ours["lora_dropout"]) == ("CAUSAL_LM", 0.0)
    assert (directory / "adapter" / WEIGHTS).read_bytes() == weights()
    assert list((directory.parent / ".uploads").iterdir()) == []


def test_training_goes_on_from_an_upload_without_optimizer_state(helper: Stack) -> None:
    upload(helper, weights())
    helper.alice.feedback("two")
    lease = helper.worker.must_lease()
    assert lease.parent is not None
    assert lease.parent.version == 1
    assert not (helper.root / lease.parent.uri / "trainer").exists()
    assert helper.worker.train(lease) == 2


def test_a_run_that_trains_meanwhile_is_fenced_and_trained_again(helper: Stack) -> None:
    job = helper.alice.feedback("one")["job_id"]
    lease = helper.worker.must_lease()
    upload(helper, weights())
    error_of(helper.worker.call(lease, "heartbeat"), 409, "lease_lost")
    assert helper.alice.job(job)["status"] == "queued"
    again = helper.worker.must_lease()
    assert again.parent is not None
    assert again.parent.version == 1
    assert helper.worker.train(again) == 2


def test_a_commit_whose_answer_was_lost_is_safe_to_repeat(helper: Stack) -> None:
    first = upload(helper, weights())
    again = commit(helper, config(), weights())
    assert again.status_code == 201
    assert again.json()["version"] == first["version"] == 1
    assert helper.count("versions") == 1


def test_a_commit_of_what_was_never_uploaded_is_404(helper: Stack) -> None:
    error_of(commit(helper, config(), weights()), 404, "upload_not_found")
    put(helper, CONFIG, config())
    error_of(commit(helper, config(), weights()), 404, "upload_not_found")
    # Nor can one file stand for the other.
    put(helper, WEIGHTS, weights())
    error_of(commit(helper, weights(), weights()), 422, "version_rejected")
    error_of(commit(helper, config(), config()), 422, "version_rejected")


def zipped() -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(WEIGHTS, weights())
        return buffer.getvalue()


def tarred(mode: str) -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
            entry = tarfile.TarInfo(WEIGHTS)
            entry.size = len(weights())
            archive.addfile(entry, io.BytesIO(weights()))
        return buffer.getvalue()


BIGGER = SETTINGS.model_copy(update={"rank": 64})
NAN = peft_files.tensors(SETTINGS)[Q_A].copy()
NAN.flat[-1] = np.nan
BAD_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "NaN": (weights(**{Q_A: NAN}), "not_finite"),
    "infinity": (weights(**{Q_A: NAN * 0 + np.inf}), "not_finite"),
    "huge": (weights(1e20), "too_large"),
    "extra keys": (weights(**{Q_A.replace("q_proj", "x_proj"): NAN}), "extra_keys"),
    "another base": (weights(**{Q_A.replace("layers.0", "layers.30"): NAN}), "extra_keys"),
    "too high a rank": (weights(lora=BIGGER), "wrong_shape"),
    "DoRA": (weights(**{Q_A.replace("lora_A", "lora_magnitude_vector"): NAN[0]}), "extra_keys"),
    "truncated": (weights()[:-10], "bad_file"),
    "grown": (weights() + b"x", "bad_file"),
    "header bomb": ((2**63).to_bytes(8, "little") + b"{" * 1000, "bad_file"),
    "header over a MiB": (peft_files.with_header(b" " * (2**20 + 1)), "bad_file"),
    "deep header": (peft_files.with_header(b"[" * 100_000), "bad_file"),
    "pickle": (pickle.dumps({"w": list(range(1000))}, protocol=5), "pickle"),
    "zip": (zipped(), "archive"),
    "tar": (tarred("w"), "archive"),
    "tar.gz": (tarred("w:gz"), "archive"),
    "tar.xz": (tarred("w:xz"), "archive"),
    "nothing": (b"", "bad_file"),
    "text": (b"hello " * 200, "bad_file"),
}
BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "another base": (config(base_model_name_or_path="meta/other"), "wrong_base"),
    "auto_map": (config(auto_map={"AutoModel": "evil.Model"}), "unsupported: auto_map"),
    "DoRA": (config(use_dora=True), "unsupported: use_dora"),
    "too high a rank": (config(r=64), "wrong_rank"),
    "other modules": (config(target_modules="all-linear"), "wrong_modules"),
    "a pickle": (pickle.dumps({}), "bad_config"),
    "not json": (b"{", "bad_config"),
}


def refused(stack: Stack, name: str, body: bytes, reason: str) -> None:
    before = stack.alice.adapter()
    error = error_of(put(stack, name, body), 422, "version_rejected")
    assert error["message"].startswith(reason), error["message"]
    assert stack.alice.adapter() == before
    staging = stack.root / before["id"] / ".uploads"
    assert list(staging.iterdir()) == [], "nothing of it is kept"


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name(helper: Stack, kind: str) -> None:
    refused(helper, WEIGHTS, *BAD_WEIGHTS[kind])
    assert helper.engine.events == []


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_bad_configs_are_refused_by_name(helper: Stack, kind: str) -> None:
    refused(helper, CONFIG, *BAD_CONFIGS[kind])


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "tokenizer.json", "..", "%2e%2e", "adapter_config.json%00", "ädapter.json", "a%2fb"]
)
def test_other_files_are_refused(helper: Stack, name: str) -> None:
    answer = helper.alice.request("PUT", f"{URL}/{name}", content=b"x")
    assert answer.status_code in (404, 405, 422)
    assert answer.json()["error"]["code"] in ("invalid_parameter", "route_not_found", "method_not_allowed")
    assert list(helper.root.rglob("*")) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "ü", "名前", "a b", "A", ".hidden", "a\\b", "", "x" * 64])
def test_adapters_have_no_such_names(stack: Stack, name: str) -> None:
    error = error_of(stack.alice.post("/v1/adapters", {"name": name, "lora": LORA}), 422, "invalid_parameter")
    assert error["param"] == "name"


def test_the_bodys_size_is_limited_by_the_adapters_shape(helper: Stack) -> None:
    error_of(put(helper, CONFIG, b" " * 70_000), 413, "body_too_large")
    error_of(put(helper, WEIGHTS, weights() + b"\x00" * 2 * 2**20), 413, "body_too_large")


def test_uploads_may_be_larger_than_other_bodies(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(max_body_bytes=2048, max_upload_bytes=10_000)
    stack.alice.create()
    assert len(weights()) > 2048
    assert put(stack, WEIGHTS, weights()).status_code == 200
    error_of(put(stack, WEIGHTS, b"x" * 10_001), 413, "body_too_large")
    error_of(stack.alice.post("/v1/adapters", {"name": "x" * 3000}), 413, "body_too_large")


def test_another_tenants_adapter_is_absent(helper: Stack) -> None:
    error_of(helper.bob.request("PUT", f"{URL}/{CONFIG}", content=config()), 404, "adapter_not_found")
    body = {"config_sha256": "0" * 64, "weights_sha256": "0" * 64}
    error_of(helper.bob.post(f"{URL}/commit", body), 404, "adapter_not_found")


def test_only_so_many_uploads_may_wait(helper: Stack) -> None:
    for i in range(uploads.MAX_STAGED):
        assert put(helper, WEIGHTS, weights(0.01 * i)).status_code == 200
    error_of(put(helper, WEIGHTS, weights(0.9)), 429, "over_quota")
    uploads.clear_stale(helper.root, older_than=-1.0)
    assert put(helper, WEIGHTS, weights(0.9)).status_code == 200


def wanted(model_shapes: dict[str, tuple[int, ...]] | None = None) -> uploads.Wanted:
    shapes = {f"model.layers.0.{m}": s for m, s in peft_files.MODULES.items()}
    return uploads.Wanted(peft_files.BASE, model_shapes or shapes, SETTINGS)


class Sender:
    """Pieces of a body; counts how many were taken."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.taken = pieces, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.taken += 1
            yield piece


@pytest.mark.anyio
async def test_a_bad_header_is_refused_before_the_rest_is_taken(tmp_path: Path) -> None:
    adapter = tmp_path
    wrong = peft_files.with_header(
        json.dumps({"a": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}}).encode()
    )
    sender = Sender(wrong.ljust(600), *[b"\x00" * 2**16] * 64)
    with pytest.raises(VersionRejected, match=r"^(bad_file|missing_keys)"):
        await uploads.receive(sender.__aiter__(), adapter, WEIGHTS, wanted())
    assert sender.taken == 1
    endless = Sender(weights()[:-1], *[b"\x00" * 2**16] * 10_000)
    with pytest.raises(TooLarge):
        await uploads.receive(endless.__aiter__(), adapter, WEIGHTS, wanted())
    assert endless.taken < 2 + admission.largest_weights(wanted().base_shapes, SETTINGS) // 2**16 + 1
    assert list((adapter / ".uploads").iterdir()) == []


@pytest.mark.anyio
async def test_a_sender_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield weights()[:100]
        await asyncio.Event().wait()

    with pytest.raises(BadRequest) as stalled:
        await uploads.receive(silent(), tmp_path, WEIGHTS, wanted(), patience=0.05)
    assert stalled.value.code == "upload_stalled"
    assert list((tmp_path / ".uploads").iterdir()) == []


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_taken_or_refused_and_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes over any part of a good file, cut into any pieces: what is taken is a file that would be loaded."""
    good, at = weights(), data.draw(st.integers(0, 600))
    body = good[:at] + data.draw(st.binary(max_size=40)) + good[at + data.draw(st.integers(0, 40)) :]
    cut = data.draw(st.integers(0, len(body)))

    async def send() -> FileEntry:
        return await uploads.receive(Sender(body[:cut], body[cut:]).__aiter__(), tmp_path, WEIGHTS, wanted())

    try:
        entry = asyncio.run(send())
    except VersionRejected:
        assert list((tmp_path / ".uploads").iterdir()) == []
        return
    path = tmp_path / ".uploads" / entry.sha256
    admission.check_weights(path, wanted().base_shapes, SETTINGS)
    assert path.read_bytes() == body
    path.unlink()
