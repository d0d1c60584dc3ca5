"""Feedback in batches: what a client says about answers, and what became of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from api_schemas.base import AdapterName, Identifier, Remark, Request, Response, Text, UserName
from api_schemas.chat import MAX_MESSAGES, ChatMessage
from api_schemas.sampling import MAX_CHOICES
from api_schemas.training import TrainingSettings

MAX_ITEMS = 1024


class FeedbackItem(Request):
    """A remark on one answer: named by its completion id, or given in full if it did not come through the gateway."""

    feedback: Remark
    completion_id: Identifier | None = None
    choice: Annotated[int, Field(ge=0, lt=MAX_CHOICES)] = 0
    """Which of the completion's choices, where it was asked for several (`n`)."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    response: Text | None = None
    demonstration: Remark | None = None
    """A good answer to the same prompt; only the teacher sees it."""
    standing: bool = True
    """True: a preference that holds from now on, told to the teacher in later batches too. False: holds for this answer
    alone (a corrected fact, a traceback)."""

    user: UserName | None = None
    """Whose words these are, where the completion does not say it: `DELETE /v1/users/{user}` erases them."""

    @model_validator(mode="after")
    def _one_answer(self) -> FeedbackItem:
        inline = self.messages is not None or self.response is not None
        if (self.completion_id is not None) == inline:
            raise ValueError("give either completion_id, or messages and response")
        if inline and self.choice:
            raise ValueError("choice belongs to a completion_id")
        if inline and (self.messages is None or not self.response):
            raise ValueError("messages and a non-empty response belong together")
        if self.messages is not None and not any(m.role == "user" for m in self.messages):
            raise ValueError("messages need at least one of role user")
        return self


class FeedbackRequest(Request):
    items: Annotated[list[FeedbackItem], Field(min_length=1, max_length=MAX_ITEMS)]
    adapter: AdapterName | None = None
    """Which adapter learns. May be left out when the completions name it."""
    training: TrainingSettings | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    """Among the tenant's own adapters: each step counts as a minute of waiting (a setting). Feedback on one adapter
    keeps its order; what is urgent lifts what waits before it."""


BatchStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class FeedbackItemView(Response):
    id: str
    completion_id: str | None = None
    """None for an answer that was given in full."""
    choice: int = 0
    feedback: str
    demonstration: str | None = None
    standing: bool
    erased: Literal["request", "retention"] | None = None
    """Why there is no text of it any more."""


class FeedbackBatch(Response):
    id: str
    object: Literal["feedback.batch"] = "feedback.batch"
    adapter: str
    job_id: str
    status: BatchStatus
    item_count: int
    version: int | None = None
    """The version that learnt from this batch, once there is one."""
    created_at: int
    """Unix seconds."""
    items: list[FeedbackItemView] | None = None
    """Only in `GET /v1/feedback/{batch}`."""
