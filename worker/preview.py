"""From an explanation to what the service shows of it: bounded, readable, finite."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

from api_schemas.preview import MAX_PREVIEW_TOKENS, Preview, PreviewItem, PreviewToken, TeacherChoice
from api_schemas.worker import Lease, LeasedItem
from sdpo_core.explain import AnswerView, Explanation, TokenView
from worker.errors import TrainingFailedError

_DIGITS = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A single byte in vocabularies made by SentencePiece."""


class Vocabulary(Protocol):
    """The part of a tokenizer that is used here."""

    def convert_ids_to_tokens(self, ids: int) -> str: ...


def preview_of(lease: Lease, shown: Explanation, tokenizer: Vocabulary) -> Preview:
    """The wire's form. Every item shows the same number of its first tokens at most, the numbers are of all of them.

    Raises TrainingFailedError `not_finite` when the model gives a number that is none.
    """
    room = MAX_PREVIEW_TOKENS // len(lease.items)
    items = [
        _item(item, answer, shown.threshold, room, tokenizer)
        for item, answer in zip(lease.items, shown.answers, strict=True)
    ]
    return Preview(
        version=lease.parent.version if lease.parent else 0,
        threshold=shown.threshold,
        acting_share=shown.acting_answers,
        moved_share=shown.acting_tokens,
        expected_drift=_number(shown.expected_drift),
        items=items,
    )


def _item(item: LeasedItem, answer: AnswerView, threshold: float, room: int, tokenizer: Vocabulary) -> PreviewItem:
    tokens = answer.tokens
    gaps = [abs(t.gap) for t in tokens]
    return PreviewItem(
        id=item.id,
        acts=answer.peak_effect >= threshold,
        moved_share=_mean([float(t.effect >= threshold) for t in tokens]),
        mean_gap=_mean(gaps),
        largest_gap=_number(max(gaps, default=0.0)),
        expected_drift=_mean([t.distance for t in tokens]),
        response_tokens=len(tokens),
        tokens=[_token(t, tokenizer) for t in tokens[:room]],
        tokens_left_out=max(0, len(tokens) - room),
    )


def _token(view: TokenView, tokenizer: Vocabulary) -> PreviewToken:
    choice: dict[str, Any] = _piece(view.instead, view.instead_text, tokenizer)
    return PreviewToken(
        **_piece(view.id, view.text, tokenizer),
        student=_number(view.student),
        teacher=_number(view.told),
        effect=_number(view.effect),
        instead=None if view.instead == view.id else TeacherChoice(**choice, logprob=_number(view.instead_logp)),
    )


def _piece(token_id: int, text: str, tokenizer: Vocabulary) -> dict[str, Any]:
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return {"text": text}
    return {"text": text, "bytes": token_bytes(tokenizer.convert_ids_to_tokens(token_id))}


def token_bytes(piece: str) -> list[int] | None:
    """Bytes of a vocabulary entry, byte-level or a SentencePiece byte; None where it is neither.

    Byte-level vocabularies write printable Latin-1 as itself and the other bytes, in order, from U+0100 on.
    """
    if single := _BYTE_TOKEN.fullmatch(piece):
        return [int(single[1], 16)]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    known = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    return [known[c] for c in piece] if all(c in known for c in piece) else None


def _mean(values: Sequence[float]) -> float:
    return _number(sum(values) / len(values)) if values else 0.0


def _number(value: float) -> float:
    """For a reader: four digits after the point, which are none of an infinity or NaN."""
    if not math.isfinite(value):
        message = "the model gives log-probs that are not finite on these answers: its weights or its precision are bad"
        raise TrainingFailedError("not_finite", message, retryable=False)
    return round(value, _DIGITS) + 0.0  # and no minus zero
