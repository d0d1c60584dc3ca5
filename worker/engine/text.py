"""Text of a token stream, as it grows: never half a character, never part of a stop string."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """Token ids to text, special tokens left out."""

    def __call__(self, ids: Sequence[int]) -> str: ...


class IncrementalText:
    """Decodes a token stream piece by piece.

    Tokens whose text ends in an incomplete character are held until the character is complete: a token may be one byte
    of an emoji. A short tail of earlier tokens is decoded with the new ones, because some tokenizers treat the first
    token of a text differently.
    """

    def __init__(self, decode: Decoder) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # first id of the tail that is decoded again
        self._done = 0  # ids before this one have been returned as text

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty in the middle of a character."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(_INCOMPLETE):
            return ""
        if text:
            self._context, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, without a character that was cut off."""
        text = self._pending().rstrip(_INCOMPLETE)
        self._context = self._done = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]


class StoppingText:
    """Incremental text that ends before the first stop string.

    As many characters as a stop string could still need are held back, so that a streaming client never sees its start.
    """

    def __init__(self, decode: Decoder, stops: Sequence[str]) -> None:
        self._text = IncrementalText(decode)
        self._stops = tuple(stops)
        self._held = ""
        self._hold = max((len(stop) for stop in stops), default=1) - 1

    def push(self, token_id: int) -> tuple[str, str | None]:
        """(text to send now, the stop string that was reached or None). After a stop nothing more may be pushed."""
        self._held += self._text.push(token_id)
        stop = self._cut()
        keep = 0 if stop is not None else self._hold
        split = max(0, len(self._held) - keep)
        send, self._held = self._held[:split], self._held[split:]
        return send, stop

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text, at the end of the generation, and the stop string in it if there is one."""
        self._held += self._text.flush()
        stop = self._cut()
        send, self._held = self._held, ""
        return send, stop

    def _cut(self) -> str | None:
        """Cut the held text at the earliest stop string. What was sent before cannot hold the start of one."""
        found = [(self._held.index(stop), stop) for stop in self._stops if stop in self._held]
        if not found:
            return None
        position, stop = min(found, key=lambda hit: hit[0])
        self._held = self._held[:position]
        return stop
