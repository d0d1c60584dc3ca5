"""The base model, and one forward over rows that use different adapters and have different lengths.

Shapes: B rows, T new tokens, W key positions seen, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from worker.engine.cache import SlotCache, make_plan
from worker.engine.errors import UnsupportedModelError
from worker.engine.lora import LoraWeights, install_lora


@dataclass(frozen=True)
class Row:
    """One row of a forward: `tokens` follow the `past` tokens that its slot already holds."""

    tokens: Sequence[int]
    past: int
    weights: LoraWeights | None


class ModelRunner:
    """A causal language model whose linear layers take per-row adapters, and its cache.

    Only the decoding loop calls `forward` and touches `cache`. `shapes` names the layers that adapters may target.
    """

    def __init__(self, model: nn.Module, *, slots: int, max_model_len: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._lora, self.shapes = install_lora(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(embeddings.num_embeddings)
        """Token ids are below this."""
        self.max_model_len = max_model_len
        self.cache = SlotCache(slots, max_model_len)

    @torch.inference_mode()
    def forward(self, first_slot: int, rows: Sequence[Row]) -> Tensor:
        """Feed each row's tokens to slot first_slot, first_slot + 1, ...; returns logits_BV after its last token."""
        plan, positions_BT = make_plan(
            first_slot, [len(row.tokens) for row in rows], [row.past for row in rows], self.device
        )
        self.cache.begin(plan)
        self._lora.assign([row.weights for row in rows], self.device)
        width = positions_BT.shape[1]
        ids_BT = torch.tensor([[0] * (width - len(row.tokens)) + list(row.tokens) for row in rows])
        # Padding looks at position 0 only: its result is thrown away, but it must not be 0/0.
        positions_BT = positions_BT.clamp(min=0)
        mask_B1TW = torch.arange(plan.window, device=self.device) <= positions_BT[:, None, :, None]
        output = self._model(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_B1TW,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def load_runner(
    path: Path, *, device: str, dtype: str, slots: int, max_model_len: int | None
) -> tuple[ModelRunner, Any]:
    """The runner of the model directory `path`, and the model's configuration.

    Weights are read from safetensors only and no code of the model directory is run. `device` is cpu, cuda or auto;
    `dtype` float32, bfloat16 or auto: fp32 on a CPU, the type of the checkpoint on a GPU.

    Raises UnsupportedModelError for an architecture that this engine would serve wrongly.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    length = check_config(config, max_model_len)
    target = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=_dtype(dtype, target),
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return ModelRunner(model.to(target), slots=slots, max_model_len=length), config


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    named: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in named:
        return named[name]
    return torch.float32 if device.type == "cpu" else "auto"


def check_config(config: Any, max_model_len: int | None) -> int:
    """The context length to serve: what was asked for, at most what the model was made for.

    Raises UnsupportedModelError where rows of one batch could not be computed independently, or where attention is
    not over all earlier tokens: such models are for vLLM.
    """
    native = int(config.max_position_embeddings)
    if max_model_len is not None and not 1 <= max_model_len <= native:
        raise UnsupportedModelError(f"max-model-len must be in 1..{native} for this model, not {max_model_len}.")
    length = max_model_len or native
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise UnsupportedModelError("The embedded engine does not serve mixture-of-experts models; use vLLM.")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(f"The embedded engine does not serve layers of kind {sorted(kinds)}; use vLLM.")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < length:
        raise UnsupportedModelError(f"Sliding-window attention: pass a max-model-len of {window} or less.")
    return length
