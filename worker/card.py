"""What a version says about itself: a Hugging Face model card and a provenance record. Neither holds feedback text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from api_schemas.worker import Lease

PROVENANCE_FORMAT = 1
_CARD = """---
library_name: peft
base_model: {base_model}
pipeline_tag: text-generation
tags:
- lora
- self-distillation
---

# {adapter}

A LoRA adapter (rank {rank}, alpha {alpha}) for `{base_model}`, learnt from feedback by self-distillation policy
optimisation and written by Perennial. Started from {origin}; this version learnt from {items}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base_literal}), "<this directory>")
```

`perennial.json` says what it was made from, by id.
"""


def write_card(directory: Path, lease: Lease) -> None:
    """README.md of a PEFT directory."""
    count = len(lease.items)
    card = _CARD.format(
        base_model=json.dumps(lease.base_model, ensure_ascii=False),  # a JSON string is a YAML string
        base_literal=repr(lease.base_model),
        adapter=lease.adapter,
        rank=lease.lora.rank,
        alpha=lease.lora.alpha,
        origin=f"version {lease.parent.version}" if lease.parent else "the base model",
        items=f"{count} remark{'' if count == 1 else 's'}",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_provenance(directory: Path, lease: Lease, options: dict[str, Any], standing_count: int) -> None:
    """perennial.json: everything needed to say where a version came from, and nothing a person wrote."""
    record = {
        "format": PROVENANCE_FORMAT,
        "adapter": lease.adapter,
        "adapter_id": lease.adapter_id,
        "run_id": lease.run_id,
        "base_model": lease.base_model,
        "parent": lease.parent.model_dump(include={"version", "digest"}) if lease.parent else None,
        "batch_ids": lease.batch_ids,
        "feedback_ids": [item.id for item in lease.items],
        "standing_feedback_count": standing_count,
        "seed": lease.seed,
        "lora": lease.lora.model_dump(),
        "training": lease.training.model_dump(),
        "options": options,
        "libraries": {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    (directory / "perennial.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
