"""A preview: what a batch of feedback would teach, without teaching it. Log-probs and distances in nats."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from api_schemas.base import Identifier, Request, Response
from api_schemas.feedback import FeedbackItem, FeedbackRequest

MAX_PREVIEW_ITEMS = 64
MAX_PREVIEW_TOKENS = 4096
"""Tokens that one preview shows; each item has an equal part of them."""

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


class PreviewRequest(FeedbackRequest):
    """As for feedback. A preview goes before training that waits, so it is smaller."""

    items: Annotated[list[FeedbackItem], Field(min_length=1, max_length=MAX_PREVIEW_ITEMS)]


class TeacherChoice(Response):
    """The token that the teacher finds most probable."""

    text: str
    bytes: list[Byte] | None = None
    """As in PreviewToken."""
    logprob: float


class PreviewToken(Response):
    """One token of the answer."""

    text: str
    bytes: list[Byte] | None = None
    """Of a token that is only a part of a character: `text` holds the replacement character then."""
    student: float
    """Log-prob under the adapter, not told."""
    teacher: float
    """Log-prob under the teacher, told the feedback."""
    effect: float
    """KL(teacher told || teacher not told) over the vocabulary: what this feedback changes here."""
    instead: TeacherChoice | None = None
    """What the teacher wants; None: this very token."""


class PreviewItem(Response):
    """One feedback item, in the order of the request. Numbers are of all response tokens, shown or not."""

    id: Identifier
    acts: bool
    """Whether the teacher acts on the feedback at all: on one token at least its effect reaches the threshold."""
    moved_share: Share
    """Of the response tokens, those on which it does."""
    mean_gap: float
    """Mean of |teacher - student| log-prob of the answer's tokens: what is left to learn."""
    largest_gap: float
    expected_drift: float
    """KL(teacher || student), mean over the tokens: how far the student moves here if it learns all of it."""
    response_tokens: Count
    tokens: Annotated[list[PreviewToken], Field(max_length=MAX_PREVIEW_TOKENS)]
    """The first ones."""
    tokens_left_out: Count = 0
    """Response tokens that are not shown: a preview shows `MAX_PREVIEW_TOKENS` in all."""


class Preview(Response):
    version: Count
    """The version that learning would have started from; 0 is the base model."""
    threshold: float
    """An effect from which on a token counts as moved."""
    acting_share: Share
    """Of the answers that teach at all, those on which the teacher acts."""
    moved_share: Share
    """Of all response tokens."""
    expected_drift: float
    """Mean over all response tokens."""
    items: Annotated[list[PreviewItem], Field(max_length=MAX_PREVIEW_ITEMS)]


class ResultRequest(Request):
    """Worker to service: the end of a preview's run."""

    token: int
    preview: Preview
