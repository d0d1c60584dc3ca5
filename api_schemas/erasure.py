"""Erasing what users said, and building an adapter anew as if they had not said it."""

from __future__ import annotations

from typing import Literal

from api_schemas.base import Request, Response


class Learners(Response):
    """Versions of one adapter that had learnt from what was erased, themselves or through the version they started
    from. They go on as they are until `POST /v1/adapters/{adapter}/rebuild`."""

    adapter: str
    versions: list[int]


class Erasure(Response):
    """What is in no row of the database any more."""

    object: Literal["erasure"] = "erasure"
    items: list[str]
    """Ids of feedback items: remark, demonstration, and messages and answer that came with them."""
    completions: list[str]
    """Ids of answers with their messages, token ids and log-probs, choice by choice."""
    kept_completions: list[str] = []
    """Answers of erased items that other feedback items are about."""
    cancelled_jobs: list[str] = []
    """Jobs that had nothing left to learn."""
    learnt_by: list[Learners] = []
    scrubbed: bool
    """True: the database's files were written anew, so the bytes are gone too. False: the database is busy, it is done
    as soon as it can be."""


class CompletionDeleted(Response):
    """OpenAI's answer, and what else it meant here."""

    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    id: str
    deleted: bool = True
    perennial: Erasure


class RebuildRequest(Request):
    serve_meanwhile: Literal["current", "clean"] = "current"
    """What answers until the rebuild is whole. `current`: the version that answers now, although it has learnt what was
    erased: nobody notices a step back. `clean`: at once the last version that never saw it, then each rebuilt one."""


class Rebuild(Response):
    object: Literal["adapter.rebuild"] = "adapter.rebuild"
    adapter: str
    from_version: int
    """The last version that never saw what was erased; 0 is the base model. Training has gone back to it."""
    replaces: list[int]
    """Versions that had learnt it: they lose their files, the one that still answers when the rebuild is whole."""
    job_ids: list[str]
    """One for each batch that is trained once more, in order; empty when nothing was learnt since."""
    serve_meanwhile: Literal["current", "clean"]
