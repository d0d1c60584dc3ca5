"""Incremental text: whole characters only, the same text as decoding at once, cut before stop strings."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from worker.engine.text import IncrementalText, StoppingText


def byte_level() -> Tokenizer:
    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_level() -> Tokenizer:
    """A tokenizer whose first word loses its space when it is decoded, as SentencePiece's do."""
    words = [
        "▁a", "▁word", "▁more", "s", "<0xE2>", "<0x9C>", "<0xA8>",
    ]  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, WORDS = byte_level(), word_level()


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    text = IncrementalText(tokenizer.decode)
    return [*(text.push(token_id) for token_id in ids), text.flush()]


@settings(deadline=None)
@given(st.text())
def test_pieces_of_a_text_add_up_to_it(text: str) -> None:
    got = pieces(BYTES, BYTES.encode(text).ids)
    assert "".join(got) == text.rstrip("�")
    if "�" not in text:
        assert not any("�" in piece for piece in got)


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_pieces_of_any_bytes_add_up_to_the_decoded_text(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids).rstrip("�")


@settings(deadline=None)
@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4, 5, 6]]), max_size=30))
def test_spaces_survive_tokenizers_that_strip_the_first(parts: list[list[int]]) -> None:
    # Whole characters only: this decoder gives up on a run of bytes as soon as one of them is wrong.
    ids = [token_id for part in parts for token_id in part]
    assert "".join(pieces(WORDS, ids)) == WORDS.decode(ids)


def test_character_comes_when_its_last_byte_is_there() -> None:
    assert pieces(BYTES, BYTES.encode("a✨!").ids) == ["a", "", "", "✨", "!", ""]


def test_cut_off_character_is_left_out() -> None:
    assert pieces(BYTES, BYTES.encode("ab✨").ids[:-1]) == ["a", "b", "", "", ""]


def run(text: str, stops: list[str]) -> tuple[list[str], str | None]:
    stopping = StoppingText(BYTES.decode, stops)
    sent = []
    for token_id in BYTES.encode(text).ids:
        piece, stop = stopping.push(token_id)
        sent.append(piece)
        if stop is not None:
            return sent, stop
    piece, stop = stopping.finish()
    return [*sent, piece], stop


@pytest.mark.parametrize(
    ("text", "stops", "wanted", "stop"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("aab", ["aab", "ab"], "", "aab"),
        ("line\n\nnext", ["\n\n"], "line", "\n\n"),
        ("no such thing", ["thong"], "no such thing", None),
        ("thing tho", ["thong"], "thing tho", None),
        ("star ✨ here", ["✨"], "star ", "✨"),
        ("end", ["d"], "en", "d"),
        ("plain", [], "plain", None),
    ],
)
def test_text_ends_before_the_earliest_stop_string(text: str, stops: list[str], wanted: str, stop: str | None) -> None:
    sent, reached = run(text, stops)
    assert "".join(sent) == wanted
    assert reached == stop


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_a_search_in_the_whole_text(text: str, stops: list[str]) -> None:
    # The reference looks at every prefix of the text in turn, as a generation does.
    wanted = text
    for end in range(len(text) + 1):
        found = [text[:end].index(stop) for stop in stops if stop in text[:end]]
        if found:
            wanted = text[: min(found)]
            break
    assert "".join(run(text, stops)[0]) == wanted
