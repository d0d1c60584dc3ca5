"""Loss and gradient from hidden states against the plain formula under autograd, for every divergence it covers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpo_core import divergence as dv
from sdpo_core.divergence import DivergenceSpec, Target
from sdpo_core.fast.head import LossSpec, RowInputs, loss_and_gradient
from sdpo_core.fast.scores import Head, scored
from sdpo_core.terms import BASE_DISTANCE, TokenTerms, token_terms

SPECS = {
    "forward, tail": DivergenceSpec(0.0, "teacher", 7, "tail"),
    "reverse, tail": DivergenceSpec(1.0, "teacher", 7, "tail"),
    "mixture, tail": DivergenceSpec(0.3, "teacher", 7, "tail"),
    "mixture, renormalised": DivergenceSpec(0.5, "teacher", 7, "renormalise"),
    "reverse, renormalised": DivergenceSpec(1.0, "teacher", 7, "renormalise"),
    "sampled": DivergenceSpec(1.0, "sampled", None),
    "sampled with a floor": DivergenceSpec(1.0, "sampled", 7),
    "all tokens kept": DivergenceSpec(0.5, "teacher", 1000, "tail"),
}


class Case:
    """Hidden states, a head, a teacher, and everything else that a token brings."""

    def __init__(
        self, spec: DivergenceSpec, n: int = 11, v: int = 53, seed: int = 0, dtype: torch.dtype = torch.float64,
        base: bool = True,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.hidden_NH, self.head = normal(n, 12).to(dtype), Head(normal(v, 12).to(dtype), normal(v).to(dtype))
        self.ids_N = torch.randint(0, v, (n,), generator=g)
        self.target = dv.teacher_target(normal(n, v) * 3, self.ids_N, spec)
        behaviour_N = -torch.rand(n, generator=g) * 6
        behaviour_N[::4] = float("nan")
        self.inputs = RowInputs(
            weights_N=torch.rand(n, generator=g),
            behaviour_N=behaviour_N,
            base_logp_N=-torch.rand(n, generator=g) * 5 if base else None,
            base_target=dv.teacher_target(normal(n, v), self.ids_N, BASE_DISTANCE) if base else None,
            previous_logp_N=-torch.rand(n, generator=g) * 5,
            token_weights_N=torch.rand(n, generator=g) * 2,
        )

    def plain(self, spec: LossSpec) -> tuple[TokenTerms, Tensor]:
        hidden_NH = self.hidden_NH.clone().requires_grad_()
        logits_NV = torch.nn.functional.linear(hidden_NH, self.head.weight_VH, self.head.bias_V)
        x = self.inputs
        terms = token_terms(
            logits_NV, self.target, self.ids_N, torch.ones(len(self.ids_N)), spec.divergence,
            is_clip=spec.is_clip, behaviour_BT=x.behaviour_N, base_logp_BT=x.base_logp_N, base_target=x.base_target,
            previous_logp_BT=x.previous_logp_N, token_weights_BT=x.token_weights_N,
        )  # fmt: skip
        loss = terms.distill + spec.base_kl_weight * terms.anchor + spec.previous_kl_weight * terms.previous_anchor
        (gradient_NH,) = torch.autograd.grad((loss * x.weights_N).sum(), hidden_NH)
        return terms, gradient_NH

    def fast(self, spec: LossSpec, size: int = 4) -> tuple[TokenTerms, Tensor]:
        return loss_and_gradient(self.head, self.hidden_NH, self.ids_N, self.target, self.inputs, spec, size)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def compare(case: Case, spec: LossSpec, size: int, *, gradient: float, values: float) -> None:
    """Gradient by relative norm, every term of every token by its largest difference.

    A gradient that has almost vanished is measured against one of a tenth of a nat per token: it is float32 noise.
    """
    (found, found_NH), (expected, expected_NH) = case.fast(spec, size), case.plain(spec)
    unit = 0.1 * case.inputs.weights_N.norm() * case.head.weight_VH.float().norm(dim=1).mean()
    assert float((found_NH - expected_NH).norm()) <= gradient * max(float(expected_NH.norm()), float(unit))
    for name in vars(expected):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).detach(), rtol=values, atol=values)


@pytest.mark.parametrize("anchors", [(0.0, 0.0), (0.4, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_plain_formula(name: str, anchors: tuple[float, float]) -> None:
    """Active clipping, unknown behaviour, every weight; float32 statistics throughout."""
    spec = LossSpec(SPECS[name], is_clip=1.5, base_kl_weight=anchors[0], previous_kl_weight=anchors[1])
    case = Case(SPECS[name], dtype=torch.float32)
    clipped = case.plain(spec)[0]
    assert bool((clipped.ratio == 1.5).any())
    assert bool((clipped.ratio < 1.5).any())
    compare(case, spec, 4, gradient=1e-5, values=2e-5)


@settings(deadline=None)
@given(
    n=st.integers(1, 9), v=st.integers(8, 90), k=st.integers(2, 7), size=st.integers(1, 12), seed=st.integers(0, 9999)
)
def test_property_39_any_chunk_size(n: int, v: int, k: int, size: int, seed: int) -> None:
    """Chunks that do not divide T, odd K, V that is no multiple of anything."""
    for name in ("mixture, tail", "mixture, renormalised", "sampled"):
        spec = LossSpec(replace(SPECS[name], top_k=k), is_clip=2.0)
        compare(Case(spec.divergence, n, v, seed, torch.float32), spec, size, gradient=1e-4, values=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_property_38_bfloat16(name: str) -> None:
    """Half-precision logits: the loss is computed in float32, the gradient comes back in the input's type."""
    spec = LossSpec(SPECS[name], is_clip=2.0)
    low = Case(SPECS[name], dtype=torch.bfloat16)
    gradient_NH = low.fast(spec)[1]
    assert gradient_NH.dtype == torch.bfloat16
    assert relative(gradient_NH, low.plain(spec)[1]) <= 1e-2


def test_gradient_is_sparse_only_where_it_may_be() -> None:
    """Renormalised without anchors: rows of the head that are not kept may hold anything."""
    name = "mixture, renormalised"
    case = Case(SPECS[name], dtype=torch.float32)
    assert case.target.index is not None
    free, anchored = LossSpec(SPECS[name], is_clip=1.5), LossSpec(SPECS[name], is_clip=1.5, base_kl_weight=0.5)
    compare(case, free, 4, gradient=1e-5, values=2e-5)
    compare(case, anchored, 4, gradient=1e-5, values=2e-5)
    assert relative(case.fast(anchored)[1], case.fast(free)[1]) > 1e-2


def test_a_tiny_tail_keeps_its_digits() -> None:
    """Mass of 2e-6 outside the kept tokens: its spread is half a million, and no noise may come of it."""
    spec = LossSpec(DivergenceSpec(0.0, "teacher", 2, "tail"), is_clip=None)
    case = Case(spec.divergence, n=1, v=30, dtype=torch.float32)
    logits_1V = torch.full((1, 30), -13.0)
    logits_1V[0, :2] = torch.tensor([2.0, 1.0])
    case.hidden_NH, case.head = torch.ones(1, 1), Head(logits_1V.T.contiguous())
    case.target = Target(torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0, 1]]), torch.tensor([0.2]).log())
    case.ids_N = torch.tensor([0])
    found_NH = case.fast(spec)[1]
    exact = Case(spec.divergence, n=1, v=30)
    exact.hidden_NH, exact.head, exact.target = case.hidden_NH.double(), Head(logits_1V.T.double()), case.target
    exact.ids_N, exact.inputs = case.ids_N, case.inputs
    assert relative(found_NH, exact.plain(spec)[1]) <= 1e-6


def test_forbidden_tokens() -> None:
    """Logits of -inf inside and outside the teacher's top K."""
    for name in ("mixture, tail", "reverse, renormalised", "sampled"):
        spec = LossSpec(SPECS[name], is_clip=2.0)
        case = Case(SPECS[name], dtype=torch.float32)
        assert case.head.bias_V is not None
        index = case.target.index
        inside = int(index[0, 0]) if index is not None else int(case.ids_N[0])
        case.head.bias_V[inside] = -torch.inf
        case.head.bias_V[5] = -torch.inf
        compare(case, spec, 4, gradient=1e-5, values=2e-5)


def test_scored_in_chunks_is_scored_at_once() -> None:
    spec = SPECS["forward, tail"]
    case = Case(spec, dtype=torch.float32)

    def keep(logits_NV: Tensor, ids_N: Tensor) -> Target:
        return dv.teacher_target(logits_NV, ids_N, spec)

    whole, parts = (scored(case.head.logits, case.hidden_NH, case.ids_N, size, keep) for size in (100, 3))
    for a, b in zip((whole.logp, whole.index, whole.log_tail), (parts.logp, parts.index, parts.log_tail), strict=True):
        torch.testing.assert_close(a, b)


def test_large_logits_keep_their_digits() -> None:
    """Logits around 300: a logsumexp of that size in float32 would put an error of 1e-5 into every ratio."""
    for name in ("mixture, renormalised", "mixture, tail"):
        spec = LossSpec(SPECS[name], is_clip=1e9)
        low, exact = Case(SPECS[name], dtype=torch.float32, base=False), Case(SPECS[name], base=False)
        for case in (low, exact):
            assert case.head.bias_V is not None
            case.head.bias_V.add_(300.0)
            case.inputs = replace(case.inputs, previous_logp_N=None, behaviour_N=torch.full((11,), -3.0))
        low.hidden_NH, exact.hidden_NH = (c.hidden_NH.mul(16).round().div(16) for c in (low, exact))
        head = Head(low.head.weight_VH.mul(16).round().div(16), low.head.bias_V.float().mul(16).round().div(16))
        low.head, exact.head = head, Head(head.weight_VH.double(), head.bias_V.double())  # type: ignore[union-attr]
        assert relative(low.fast(spec)[1], exact.plain(spec)[1]) <= 2e-6
