"""The flags and variables that docker/compose.yaml gives vLLM, read by vLLM's own parser."""

from __future__ import annotations

import json
import subprocess

from tests.docker import compose
from tests.vllm.server import vllm_python

CODE = """
import json, sys
import vllm.envs as envs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
flags, variables = json.loads(sys.argv[1])
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
unknown = [v for v in variables if v not in envs.environment_variables]
print(json.dumps([parsed.enable_lora, parsed.max_loras, parsed.api_server_count, unknown]))
"""


def test_vllm_takes_its_part_of_the_compose_file() -> None:
    service = compose.services("gpu")["vllm"]
    variables = [name for name in service["environment"] if name.startswith("VLLM_")]
    done = subprocess.run(
        [str(vllm_python()), "-W", "ignore", "-c", CODE, json.dumps([service["command"], variables])],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, 8, 1, []]
