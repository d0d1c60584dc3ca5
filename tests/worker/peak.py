"""Peak memory of one real batch: `python peak.py MODEL DTYPE RANK PROMPT RESPONSE ROWS` prints bytes over the start.

The start is the interpreter with its libraries and the base model loaded. A process of its own: peaks never fall.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sdpo_core.loop import train_batch
from sdpo_core.lora import LoraSpec, attach_lora
from sdpo_core.optimizer import make_optimizer
from sdpo_core.options import Options
from sdpo_core.samples import Sample


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(model: str, dtype: str, rank: int, prompt: int, response: int, rows: int) -> None:
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    for parameter in base.parameters():  # no page of the file is left to be read later
        parameter.data = parameter.data.clone()
    policy, options = attach_lora(base, LoraSpec(rank=rank)), Options(steps=2, stop_gap=0.0, path="plain")
    samples = [
        Sample(
            prompt_ids=[5] * prompt,
            response_ids=[(7 * row + i) % 50 for i in range(response)],
            teacher_prompt_ids=[5] * prompt,
            behaviour_logprobs=None,
        )
        for row in range(rows)
    ]
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = status("VmRSS")
    train_batch(policy, make_optimizer(policy, options), samples, options)
    print(before, status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(a) for a in sys.argv[3:]))  # type: ignore[arg-type]
