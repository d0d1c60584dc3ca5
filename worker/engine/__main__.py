"""Serve a model directory and its LoRA adapters with the part of vLLM's HTTP protocol that Perennial uses."""

import argparse
import logging
import socket
from pathlib import Path

import uvicorn
from transformers.utils.logging import disable_progress_bar

from worker.engine.app import create_app
from worker.engine.engine import EngineSettings, open_engine

_STOP_SECONDS = 10  # streams that are still running at a stop get this long


class AnnouncingServer(uvicorn.Server):
    """Prints one line that a supervisor can wait for once requests are answered."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"perennial-engine ready {self._url}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; option names are vLLM's where vLLM has them."""
    parser = argparse.ArgumentParser(prog="python -m worker.engine", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory: safetensors, tokenizer, config")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--adapters-root", type=Path, required=True, help="adapters are loaded only from below here")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--max-loras", type=int, default=8, help="different adapters in one batch")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="requests decoded at once")
    parser.add_argument("--max-waiting", type=int, default=256, help="queue length beyond which requests get 503")
    parser.add_argument("--threads", type=int, help="torch's threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Load, listen, announce, serve until a signal."""
    options = vars(parse(arguments))
    host, port = options.pop("host"), options.pop("port")
    logging.basicConfig(level=logging.WARNING)
    disable_progress_bar()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=512) as listener:
        engine = open_engine(EngineSettings(**options))
        engine.start()
        try:
            config = uvicorn.Config(
                create_app(engine),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{listener.getsockname()[1]}"
            AnnouncingServer(config, url).run(sockets=[listener])
        finally:
            engine.close()


if __name__ == "__main__":
    main()
