"""Frames between supervisor and training process."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

from worker.messages import Failed, Progress, Stop, Train, frame, read_command, read_event


def events(data: bytes) -> list[Any]:
    async def read() -> list[Any]:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        found = []
        while (event := await read_event(stream)) is not None:
            found.append(event)
        return found

    return asyncio.run(read())


def test_frames_come_out_as_they_went_in() -> None:
    sent = [
        Progress(run_id="r", phase="training", step=1, steps=4),
        Failed(run_id="r", code="c", message="line\nbreak", retryable=True),
    ]
    assert events(b"".join(map(frame, sent))) == sent


def test_commands_carry_a_whole_lease(make_lease: Any) -> None:
    lease = make_lease(items=3)
    stream = io.BytesIO(frame(Train(lease=lease)) + frame(Stop(run_id="r")))
    assert read_command(stream) == Train(lease=lease)
    assert read_command(stream) == Stop(run_id="r")
    assert read_command(stream) is None


def test_a_torn_frame_is_the_end() -> None:
    whole = frame(Progress(run_id="r", phase="training"))
    for cut in range(len(whole)):
        assert events(whole + whole[:cut]) == events(whole)
        if cut:
            with pytest.raises(EOFError):
                read_command(io.BytesIO(whole[:cut]))


@pytest.mark.parametrize("noise", [b"Loading weights: 100%\n", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x04null"])
def test_what_is_no_message_is_refused(noise: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|validation"):
        events(noise)
