"""Strict in, tolerant out."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import api_schemas
from api_schemas.adapters import Adapter, AdapterCreate
from api_schemas.base import Request, Response
from api_schemas.chat import ChatRequest
from api_schemas.feedback import FeedbackItem, FeedbackRequest
from api_schemas.jobs import StepMetrics
from api_schemas.training import LoraSettings, TrainingSettings, resolve
from api_schemas.worker import CommitRequest, FileEntry

USER = {"role": "user", "content": "hi"}


def models() -> list[type[BaseModel]]:
    found = []
    for module in pkgutil.iter_modules(api_schemas.__path__):
        members = inspect.getmembers(importlib.import_module(f"api_schemas.{module.name}"), inspect.isclass)
        found += [m for _, m in members if issubclass(m, BaseModel) and m.__module__ == f"api_schemas.{module.name}"]
    return found


def test_every_model_is_either_a_request_or_a_response() -> None:
    known = [m for m in models() if m not in (Request, Response)]
    assert len(known) > 30
    for model in known:
        assert issubclass(model, Request) != issubclass(model, Response), model
        config = model.model_config
        assert config["frozen"], model
        assert config.get("extra") == ("forbid" if issubclass(model, Request) else "ignore"), model
        assert config.get("allow_inf_nan") is False, model


def test_old_clients_survive_new_fields() -> None:
    body = {
        "id": "adp_1", "name": "x", "base_model": "b", "live_version": 0, "head_version": 0, "queued_jobs": 0,
        "lora": LoraSettings(), "training": TrainingSettings(), "created_at": 1, "colour": "new",
    }  # fmt: skip
    assert Adapter.model_validate(body).name == "x"


def test_requests_survive_the_wire() -> None:
    request = FeedbackRequest(
        items=[FeedbackItem(completion_id="chatcmpl-1", feedback="shorter")], training=TrainingSettings(steps=2)
    )
    assert FeedbackRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    "item",
    [
        {"feedback": "x"},
        {"feedback": "x", "completion_id": "c", "response": "r"},
        {"feedback": "x", "completion_id": "c", "messages": [USER]},
        {"feedback": "x", "messages": [USER]},
        {"feedback": "x", "response": "r"},
        {"feedback": "x", "messages": [USER], "response": ""},
        {"feedback": "x", "messages": [{"role": "system", "content": "s"}], "response": "r"},
        {"feedback": "x", "messages": [], "response": "r"},
        {"feedback": "x", "messages": [{"role": "tool", "content": "s"}], "response": "r"},
        {"completion_id": "c"},
        {"completion_id": "c", "feedback": None},
        {"completion_id": "c", "feedback": "x", "standing": "yes"},
        {"completion_id": "c", "feedback": "x", "demonstration": " "},
    ],
)
def test_items_that_name_no_one_answer(item: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FeedbackItem.model_validate(item)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 1},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"n": 17},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"seed": -(2**63) - 1},
        {"stop": []},
        {"stop": [""]},
        {"stop": ["a"] * 5},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
    ],
)
def test_chats_that_are_not_coherent(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"model": "m", "messages": [USER]} | fields)


def test_parts_are_joined_and_only_role_and_text_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": "someone"}
    chat = ChatRequest.model_validate({"model": "m", "messages": [message]})
    assert chat.messages[0].plain() == {"role": "user", "content": "ab"}


@pytest.mark.parametrize(
    "name", ["adapter/../x", "other/x", "adapter/", "adapter/a/b", "/adapter/x", "adapter/a b", "adapter/ä"]
)
def test_file_names_stay_inside(name: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(name=name, size=1, sha256="0" * 64)


@pytest.mark.parametrize("uri", ["a", "a/b/c", "../b", "a/..", "/a/b", "a/b\n", "a//b"])
def test_uris_are_two_plain_names(uri: str) -> None:
    files = [FileEntry(name=f"adapter/{n}", size=1, sha256="0" * 64) for n in "ab"]
    with pytest.raises(ValidationError, match="uri"):
        CommitRequest(token=1, uri=uri, files=files, standing_feedback=[], metrics=[], training_seconds=1)


def test_numbers_that_are_no_numbers() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            StepMetrics(step=1, loss=value)
    with pytest.raises(ValidationError):
        StepMetrics(step=-1, loss=0.0)


def test_training_settings_are_resolved_in_order() -> None:
    adapter = TrainingSettings(preset="lasgroup", steps=3, alpha=0.25)
    assert resolve(adapter).steps == 3
    assert resolve(adapter).support == "student_topk"
    merged = resolve(adapter, TrainingSettings(alpha=0.75))
    assert (merged.preset, merged.steps, merged.alpha) == ("lasgroup", 3, 0.75)
    own = resolve(adapter, TrainingSettings(preset="claas"))
    assert (own.preset, own.steps, own.alpha, own.is_clip) == ("claas", 1, 0.5, 5.0)


def test_defaults_are_not_shared_between_requests() -> None:
    first = AdapterCreate(name="a")
    first.lora.target_modules.append("x_proj")
    assert "x_proj" not in AdapterCreate(name="b").lora.target_modules
