"""A vLLM that computes in bfloat16, where this machine's CPU can.

On one of the machines these tests have run on, vLLM's kernels for bfloat16 ended in an illegal instruction. That, and
nothing else, is a reason to do without: a child process of its own finds it out, and only when the server has failed.
"""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress

import httpx2
import pytest

from tests.vllm.server import VllmFailed, VllmServer, vllm_python

FLAGS = ("--dtype", "bfloat16")
ONE_TOKEN = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64)
llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=1))
"""


def started(server: VllmServer) -> None:
    """Start it and let it generate from a prompt of one token. Skips the test where the CPU cannot."""
    server.start()
    with suppress(VllmFailed, httpx2.TransportError):
        server.wait_healthy()
        body = {"model": server.config.served_name, "prompt": [1], "max_tokens": 2, "temperature": 0}
        if httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60.0).status_code == 200:
            return
    log = server.tail()
    server.stop(force=True)
    if one_token(server) == -signal.SIGILL:
        pytest.skip("this CPU has not all of the instructions that vLLM's kernels for bfloat16 are made of (SIGILL)")
    pytest.fail(f"vLLM does not run in bfloat16, and not for want of an instruction:\n{log}")


def one_token(server: VllmServer) -> int:
    """How a process ends that does nothing but draw one token in bfloat16: 0, or the signal's number below it."""
    command = [vllm_python(), "-c", ONE_TOKEN, server.config.model]
    done = subprocess.run(
        command, env=server.environment(), cwd=server.config.log.parent, capture_output=True, timeout=300, check=False
    )
    return done.returncode
