"""The golden vectors through the fast path: every family and mode that it covers.

The vectors give logits and not hidden states; the logits are taken as hidden states under a head that changes nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.fast.head import LossSpec, RowInputs, loss_and_gradient
from sdpo_core.fast.packing import PackedBatch
from sdpo_core.fast.scores import Head
from sdpo_core.lowrank import LowRank
from sdpo_core.terms import TokenTerms

HERE = Path(__file__).parent
CHUNK = 3
ROUNDING = 2e-6
"""One rounding of a float32 log-prob times that log-prob (2.4e-7 x 7.5). A student equal to its teacher gives exactly 0
in the plain path, where both come out of one function, and this in the fast one (verl/identical/sampled)."""
COVERED = {"verl_sdpo": 70, "trl_sdpo": 14, "claas_sdpo": 40, "claas_steps": 10, "openclaw_topk": 2}
"""Families, and how many cases of each go through at least."""


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_fast_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Chunked(torch.autograd.Function):
    """Per-token losses of the fast path as a node of autograd: it computes its own gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, row: Row) -> tuple[Tensor, Tensor]:
        ctx.row = row
        terms, _ = row.run(logits_NV, torch.ones(len(logits_NV)), 0.0)
        ctx.save_for_backward(logits_NV)
        row.terms = terms
        return terms.distill.clone(), terms.anchor.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Every token's anchor has the same weight beside its divergence."""
        (logits_NV,), (distill_N, anchor_N) = ctx.saved_tensors, slopes
        weighted = distill_N.abs() > 0
        ratio = float((anchor_N[weighted] / distill_N[weighted]).mean()) if bool(weighted.any()) else 0.0
        return ctx.row.run(logits_NV, distill_N, ratio)[1], None


class Row:
    """The tokens of one case that the mask leaves."""

    terms: TokenTerms

    def __init__(self, target: Target, ids_N: Tensor, inputs: dict[str, Tensor | None], spec: LossSpec) -> None:
        self.target, self.ids_N, self.inputs, self.spec = target, ids_N, inputs, spec

    def run(self, logits_NV: Tensor, weights_N: Tensor, base_kl_weight: float) -> tuple[TokenTerms, Tensor]:
        spec = LossSpec(self.spec.divergence, self.spec.is_clip, base_kl_weight)
        inputs = RowInputs(weights_N=weights_N, **self.inputs)  # type: ignore[arg-type]
        head = Head(torch.eye(logits_NV.shape[-1], dtype=logits_NV.dtype))
        return loss_and_gradient(head, logits_NV, self.ids_N, self.target, inputs, spec, CHUNK)


def fast_terms(
    logits_BTV: Tensor, target: Target, ids_BT: Tensor, mask_BT: Tensor, spec: DivergenceSpec, *,
    is_clip: float | None, behaviour_BT: Tensor | None = None, base_logp_BT: Tensor | None = None,
    token_weights_BT: Tensor | None = None,
) -> TokenTerms:  # fmt: skip
    """`token_terms` by the fast path."""
    on_BT = mask_BT.bool()

    def kept(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[on_BT]

    target = Target(target.logp[on_BT], kept(target.index), kept(target.log_tail))
    behaviour_N = torch.full((int(on_BT.sum()),), torch.nan) if behaviour_BT is None else behaviour_BT[on_BT]
    inputs = {"behaviour_N": behaviour_N, "base_logp_N": kept(base_logp_BT), "token_weights_N": kept(token_weights_BT)}
    row = Row(target, ids_BT[on_BT], inputs, LossSpec(spec, is_clip))
    distill_N, anchor_N = _Chunked.apply(logits_BTV[on_BT], row)

    def spread(x_N: Tensor) -> Tensor:
        return torch.zeros(on_BT.shape, dtype=x_N.dtype).masked_scatter(on_BT, x_N)

    rest = {name: spread(value) for name, value in vars(row.terms).items() if name not in ("distill", "anchor")}
    return TokenTerms(distill=spread(distill_N), anchor=spread(anchor_N), **rest)


def _fast_port(adapter: ModuleType, toy: Any) -> Any:
    class FastPort(adapter.ToyPolicyPort):  # type: ignore[name-defined, misc]
        """The toy model's logits as hidden states, one packed sequence at a time."""

        path = "fast"

        def obstacle(self) -> str:
            return ""

        def head(self) -> Head:
            return Head(torch.eye(self.toy.W.shape[-1]))

        def hidden(
            self, batch: PackedBatch, *, adapter: bool, checkpointing: bool = False, compiled: bool = False
        ) -> Tensor:
            assert not checkpointing
            assert not compiled
            with torch.set_grad_enabled(adapter and torch.is_grad_enabled()):
                rows = [
                    self.toy.logits(batch.ids_P[start:end].unsqueeze(0), adapter=adapter)[0]
                    for start, end in zip(batch.starts, batch.ends, strict=True)
                ]
            return torch.cat(rows)[batch.predicts_N]

        def delta_hidden(self, batch: PackedBatch, deltas: Mapping[str, LowRank]) -> Tensor:
            raise NotImplementedError

    return FastPort(toy)


def _covers(family: str, settings: dict[str, Any], inputs: dict[str, Any]) -> bool:
    if family == "verl_sdpo" or family == "trl_sdpo":
        masked = inputs.get("response_mask", inputs.get("loss_mask"))
        return bool(masked.any())
    return family in COVERED


@cache
def _results() -> list[dict[str, Any]]:
    adapter = _module("adapter")

    def fast(family: str, settings: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any] | None:
        if not _covers(family, settings, inputs):
            return None
        if family == "claas_steps":
            result: dict[str, Any] = adapter.claas_steps(settings, inputs, _fast_port(adapter, inputs["policy"]))
        else:
            result = adapter.LOSSES[family](settings, inputs, fast_terms)
        return result

    results: list[dict[str, Any]] = _module("check").run(HERE / "public", fast)
    return results


def test_nothing_that_it_covers_fails() -> None:
    crashed = {r["name"]: r["error"] for r in _results() if "error" in r}
    assert crashed == {}
    off = {
        (r["name"], name): q["err"] for r in _results() for name, q in r["quantities"].items()
        if not q["ok"] and q["err"] > ROUNDING
    }  # fmt: skip
    assert off == {}


@pytest.mark.parametrize("family", COVERED)
def test_it_covers(family: str) -> None:
    passed = [r["name"] for r in _results() if r["family"] == family and r["status"] == "ok"]
    assert len(passed) >= COVERED[family]
