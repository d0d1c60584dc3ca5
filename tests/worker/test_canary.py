"""The canary's record: what bare PEFT computes from the version's files, and what its parent computed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from worker.base_model import BaseModel, load_base
from worker.canary import CONTINUATION, canary_ids
from worker.job import run_job
from worker.messages import Done
from worker.versions import scan, version_digest

PROMPT = "count the boats, please"


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    return load_base(model_dir, "tiny/base", "cpu", "auto")


@pytest.fixture
def run(base: BaseModel, tmp_path: Path) -> Callable[..., Done]:
    def go(lease: Any) -> Done:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return run_job(lease, base, tmp_path, report=lambda _: None, should_stop=lambda: False)

    return go


@torch.no_grad()
def bare(model_dir: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Log-probs of all tokens but the first, by Transformers and PEFT alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            model = PeftModel.from_pretrained(model, adapter)
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def parent_of(done: Done) -> dict[str, Any]:
    return {"version": 1, "uri": done.uri, "digest": version_digest(done.files)}


def test_it_is_what_the_versions_files_compute(run: Any, make_lease: Any, model_dir: Path, tmp_path: Path) -> None:
    first = run(make_lease(canary_prompt=PROMPT))
    second = run(make_lease(run_id="run_2", parent=parent_of(first), canary_prompt=PROMPT))
    one, two = first.canary, second.canary
    assert one.token_ids == two.token_ids
    assert one.dtype == "float32"
    for done, parent in ((first, None), (second, tmp_path / first.uri / "adapter")):
        record = done.canary
        own = bare(model_dir, tmp_path / done.uri / "adapter", record.token_ids)
        assert (own - torch.tensor(record.logprobs)).abs().max() < 1e-5
        before = bare(model_dir, parent, record.token_ids)
        assert (before - torch.tensor(record.parent_logprobs)).abs().max() < 1e-5
        assert (own - before).abs().max() > 1e-3, "an adapter that changes nothing would pass the lines above"


def test_the_tokens_are_the_prompt_and_the_base_models_own_words(base: BaseModel) -> None:
    ids = canary_ids(base, PROMPT)
    prompt = ids[:-CONTINUATION]
    assert PROMPT in base.tokenizer.decode(prompt)
    model: Any = base.module
    greedy = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=CONTINUATION, min_new_tokens=CONTINUATION, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert ids == greedy[0].tolist()
    assert canary_ids(base, PROMPT) == ids


def test_none_is_recorded_without_a_prompt_or_room(run: Any, make_lease: Any, base: BaseModel) -> None:
    assert run(make_lease()).canary is None
    assert canary_ids(base, "x" * base.window) == []


def test_an_uploaded_parent_has_no_trainer_directory(run: Any, make_lease: Any, tmp_path: Path) -> None:
    """A fresh optimizer; and what was committed with one cannot lose it unnoticed."""
    first = run(make_lease())
    trainer = tmp_path / first.uri / "trainer"
    kept = trainer.rename(tmp_path / "kept")
    bare_parent = {"version": 1, "uri": first.uri, "digest": version_digest(scan(tmp_path / first.uri))}
    with pytest.raises(Exception, match="are not what was committed"):
        run(make_lease(run_id="run_2", parent=parent_of(first)))
    upload = run(make_lease(run_id="run_3", parent=bare_parent))
    shutil.move(kept, trainer)
    trained = run(make_lease(run_id="run_4", parent=parent_of(first)))
    weights = "adapter/adapter_model.safetensors"
    fresh, carried = ((tmp_path / d.uri / weights).read_bytes() for d in (upload, trained))
    assert fresh != carried, "the moments make a difference"
    steps = (tmp_path / upload.uri / "trainer" / "optimizer.json").read_text()
    assert '"steps"' in steps
