"""A synthetic engine: vLLM's streaming protocol as fast as one process can write it, to measure what stands before it.

`python -m benchmarks.sse_engine PORT`. The request's `max_tokens` says how many chunks an answer has, its
`seed` how many milliseconds pass between two of them (0: none).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

MODEL = "perennial-demo"
HEAD = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
PROMPT = list(range(100, 164))


def sse(body: Any) -> bytes:
    """One event, as a chunk of HTTP."""
    event = f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def token(text: str, finish: str | None) -> bytes:
    """A chunk as vLLM writes it with log-probs and token ids on."""
    entry = {"token": text, "logprob": -0.4933872222900391, "bytes": list(text.encode()), "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [entry]}, "finish_reason": finish}
    return sse(HEAD | {"choices": [choice | {"token_ids": [343]}]})


ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
OPENING = sse(HEAD | {"choices": [ROLE], "prompt_token_ids": PROMPT})
TOKEN, LAST = token(" word", None), token(" end", "length")
START = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def plain(body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


async def stream(writer: asyncio.StreamWriter, tokens: int, pause: float) -> None:
    writer.write(START)
    writer.write(OPENING)
    for _ in range(tokens - 1):
        writer.write(TOKEN)
        await asyncio.sleep(pause)  # 0 lets the others go on, too: every token is a write of its own
        await writer.drain()
    writer.write(LAST)
    usage = {"prompt_tokens": len(PROMPT), "completion_tokens": tokens, "total_tokens": len(PROMPT) + tokens}
    writer.write(sse(HEAD | {"choices": [], "usage": usage}))
    writer.write(END)
    await writer.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            path = head.split(b" ", 2)[1]
            size = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
            body = json.loads(await reader.readexactly(size)) if size else {}
            if path == b"/v1/chat/completions":
                await stream(writer, body["max_tokens"], body.get("seed", 0) / 1000)
            elif path == b"/v1/completions":  # the service's probe: does it generate?
                writer.write(plain({"choices": [{"index": 0, "text": " word", "finish_reason": "length"}]}))
            elif path == b"/v1/models":
                writer.write(plain({"data": [{"id": MODEL, "root": MODEL, "max_model_len": 4096}]}))
            else:
                writer.write(plain({"version": "synthetic", "logprobs_mode": "raw_logprobs"}))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port: int) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
