"""Who teaches: frozen base, previous version, live student, trust region, moving average of the merged delta."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from sdpo_core import (
    AdapterError,
    BatchResult,
    EmaTeacher,
    LoraPolicy,
    LoraSpec,
    OptionError,
    Options,
    Sample,
    attach_lora,
    attached,
    load_ema,
    make_ema,
    make_optimizer,
    save_ema,
    train_batch,
)
from sdpo_core.lowrank import LowRank, weighted_sum
from sdpo_core.policy import response_logits
from sdpo_core.samples import token_batch
from sdpo_core.teachers import ema_update, trust_region_logits

OPTIONS = Options(top_k=7, steps=3, stop_gap=0.0, learning_rate=5e-3, path="plain")
SAMPLES = [
    Sample((1, 2, 3), (4, 5, 6, 7), (1, 9, 8, 2, 3)),
    Sample((1, 4, 4, 9), (4, 5), (1, 9, 8), (-1.0, -2.0)),
]


def nudged(base: Qwen3ForCausalLM, seed: int = 1) -> LoraPolicy:
    policy = attach_lora(base, LoraSpec(rank=4, alpha=8, seed=seed))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return policy


def train(policy: LoraPolicy, options: Options = OPTIONS, ema: EmaTeacher | None = None) -> BatchResult:
    return train_batch(policy, make_optimizer(policy, options), SAMPLES, options, ema=ema)


def dense(deltas: dict[str, LowRank]) -> dict[str, Tensor]:
    return {name: delta.dense() for name, delta in deltas.items()}


def kl_gap(policy: LoraPolicy, teacher: list[Tensor]) -> float:
    """Mean forward KL from given teacher log-probs (T, V) per sample to the student now."""
    kls = []
    for s, t in zip(SAMPLES, teacher, strict=True):
        student = logp(policy, s.prompt_ids, s.response_ids, adapter=True)
        kls += (t.exp() * (t - student)).sum(-1).tolist()
    return sum(kls) / len(kls)


@torch.no_grad()
def logp(policy: LoraPolicy, prompt: tuple[int, ...], response: tuple[int, ...], *, adapter: bool) -> Tensor:
    batch = token_batch([prompt], [response], policy.device)
    return torch.log_softmax(response_logits(policy, batch, adapter=adapter)[0].double(), -1)


def test_weighted_sum_is_exact_within_the_bound_and_the_best_of_its_rank_beyond() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [(w, LowRank(torch.randn(12, 3, generator=g), torch.randn(3, 9, generator=g))) for w in (0.95, 0.05)]
    want = sum(w * d.dense().double() for w, d in parts)
    exact = weighted_sum(parts, 6)
    assert exact.lost == 0
    torch.testing.assert_close(exact.delta.dense().double(), want, atol=1e-5, rtol=1e-5)
    cut = weighted_sum(parts, 2)
    values = torch.linalg.svdvals(torch.as_tensor(want))
    left_out = float(values[2:].square().sum().sqrt())
    assert cut.delta.rank == 2
    assert float((cut.delta.dense().double() - want).norm()) == pytest.approx(left_out, rel=1e-4)
    assert cut.lost == pytest.approx(left_out / float(values.norm()), rel=1e-4)


def test_a_bound_above_the_true_rank_costs_nothing() -> None:
    """Versions are alike: many of them summed have the rank of one."""
    g = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(12, 2, generator=g), torch.randn(2, 9, generator=g))
    total = one
    for _ in range(20):
        total = weighted_sum([(0.9, total), (0.1, one)], 5).delta
    assert total.rank <= 5
    torch.testing.assert_close(total.dense(), one.dense(), atol=1e-4, rtol=1e-4)


def test_the_average_scored_is_the_base_plus_the_dense_delta(base: Qwen3ForCausalLM) -> None:
    """Against weights changed by hand; and the student's own delta gives the student."""
    policy = nudged(base)
    batch = token_batch([[1, 5, 9]], [[2, 40, 3]], policy.device)
    with torch.no_grad():
        student, bare = policy.logits(batch, adapter=True), policy.logits(batch, adapter=False)
    torch.testing.assert_close(policy.delta_logits(batch, policy.deltas()), student, atol=1e-4, rtol=1e-4)
    half = {n: weighted_sum([(0.5, d)], 64).delta for n, d in policy.deltas().items()}
    scored = policy.delta_logits(batch, half)
    assert not scored.requires_grad
    assert all(p.requires_grad for _, p in policy.trainable())
    assert torch.equal(policy.logits(batch, adapter=False), bare)  # no hook stays behind
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if ".lora_B." in name:
                parameter.mul_(0.5)
        by_hand = policy.logits(batch, adapter=True)
    torch.testing.assert_close(scored, by_hand, atol=1e-4, rtol=1e-4)


def test_average_of_the_merged_delta_not_of_the_factors(base: Qwen3ForCausalLM) -> None:
    """From zero towards a constant student: 1 - .95^10 = .401 of its delta; averaged factors would give .161."""
    ema = make_ema(attach_lora(base, LoraSpec(rank=4, alpha=8)))
    base_model = Qwen3ForCausalLM(base.config).eval()
    policy = nudged(base_model)
    for _ in range(10):
        ema.update(policy, 0.05, 64)
    share = 1 - 0.95**10
    for name, delta in dense(policy.deltas()).items():
        torch.testing.assert_close(ema.deltas[name].dense(), share * delta, atol=1e-6, rtol=1e-4)
    assert ema.updates == 10


@settings(max_examples=15, deadline=None)
@given(rate=st.floats(0.001, 0.999), n=st.integers(1, 12))
def test_distance_to_a_constant_student_shrinks_geometrically(rate: float, n: int) -> None:
    teacher, student = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(n):
        ema_update(teacher, student, rate)
    torch.testing.assert_close(1 - teacher[0], torch.full((3,), (1 - rate) ** n), atol=1e-5, rtol=1e-4)


def test_rate_zero_and_one(base: Qwen3ForCausalLM) -> None:
    policy = nudged(base)
    ema = make_ema(policy)
    before = dense(ema.deltas)
    train(policy)
    ema.update(policy, 0.0, 64)
    assert all(torch.equal(d, before[n]) for n, d in dense(ema.deltas).items())
    ema.update(policy, 1.0, 64)
    assert all(torch.equal(d, dense(policy.deltas())[n]) for n, d in dense(ema.deltas).items())


def test_float32_moves_where_bfloat16_would_stay() -> None:
    low, full = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0])
    for _ in range(50):
        low = (0.95 * low + 0.05 * torch.tensor([1.01]).bfloat16()).bfloat16()
        ema_update([full], [torch.tensor([1.01])], 0.05)
    assert float(low) == 1.0
    assert float(full) > 1.009


def test_it_moves_once_per_batch_and_only_after_an_update(base: Qwen3ForCausalLM) -> None:
    options = OPTIONS.replace(teacher="ema", teacher_rate=0.1)
    policy = attach_lora(base, LoraSpec())
    ema = make_ema(policy)
    closed = train(policy, options.replace(stop_gap=1e3), ema)
    assert (closed.updates, ema.updates) == (0, 0)
    result = train(policy, options, ema)
    assert (result.updates, ema.updates) == (3, 1)
    for name, delta in dense(policy.deltas()).items():
        torch.testing.assert_close(ema.deltas[name].dense(), 0.1 * delta, atol=1e-6, rtol=1e-4)


def test_not_after_steps_that_were_not_finite(base: Qwen3ForCausalLM) -> None:
    policy = nudged(base)
    ema = make_ema(policy)
    with torch.no_grad():
        policy.trainable()[0][1].fill_(math.nan)
    result = train(policy, OPTIONS.replace(teacher="ema", measure_base_kl=False), ema)
    assert result.skipped_non_finite == 3
    assert ema.updates == 0
    assert {w.code for w in result.warnings} == {"non_finite_step"}


def test_the_loop_is_taught_by_the_average(base: Qwen3ForCausalLM) -> None:
    """The reported gap is the KL to base + average, by hand: weights halved in place."""
    policy = nudged(base)
    ema = EmaTeacher({n: weighted_sum([(0.5, d)], 64).delta for n, d in policy.deltas().items()})
    saved = {n: p.detach().clone() for n, p in policy.trainable()}
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if ".lora_B." in name:
                parameter.mul_(0.5)
    teacher = [logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=True) for s in SAMPLES]
    with torch.no_grad():
        for name, parameter in policy.trainable():
            parameter.copy_(saved[name])
    want = kl_gap(policy, teacher)
    step = train(policy, OPTIONS.replace(teacher="ema", support="full", steps=1), ema).steps[0]
    assert step.gap == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", ["previous", "live"])
def test_teachers_that_are_the_student(base: Qwen3ForCausalLM, kind: str) -> None:
    """Step 1 by hand for both; afterwards the live teacher has moved and the previous version has not."""
    policy = nudged(base)
    start = [logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=True) for s in SAMPLES]
    wants = [kl_gap(policy, start)]
    snapshots: list[float] = []

    def after(_: object) -> None:
        now = [logp(policy, s.teacher_prompt_ids, s.response_ids, adapter=True) for s in SAMPLES]
        snapshots.append(kl_gap(policy, start if kind == "previous" else now))

    options = OPTIONS.replace(teacher=kind, support="full", steps=3)
    result = train_batch(policy, make_optimizer(policy, options), SAMPLES, options, on_step=after)
    wants += snapshots[:-1]
    assert [m.gap for m in result.steps] == pytest.approx(wants, rel=1e-4)


def test_average_without_state_is_refused_by_name(base: Qwen3ForCausalLM) -> None:
    with pytest.raises(OptionError, match="make_ema"):
        train(attach_lora(base, LoraSpec()), OPTIONS.replace(teacher="ema"))


def test_state_goes_through_files_bit_for_bit(base: Qwen3ForCausalLM, tmp_path: Path) -> None:
    options = OPTIONS.replace(teacher="ema")
    with attached(base, LoraSpec(rank=4, alpha=8)) as policy:
        ema = make_ema(policy)
        for _ in range(2):
            train(policy, options, ema)
        save_ema(ema, tmp_path)
        again = load_ema(policy, tmp_path)
        assert again.updates == 2
        assert all(torch.equal(d, dense(ema.deltas)[n]) for n, d in dense(again.deltas).items())
        assert all(d.left.dtype == torch.float32 for d in again.deltas.values())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher.json", "teacher.safetensors"]


@pytest.mark.parametrize("fault", ["missing", "format", "layers", "shape", "nan"])
def test_state_of_another_adapter_is_refused(base: Qwen3ForCausalLM, tmp_path: Path, fault: str) -> None:
    with attached(base, LoraSpec(rank=4)) as policy:
        save_ema(make_ema(policy), tmp_path)
        tensors = load_file(tmp_path / "teacher.safetensors")
        first = next(n for n in tensors if n.startswith("left."))
        match fault:
            case "missing":
                (tmp_path / "teacher.safetensors").unlink()
            case "format":
                (tmp_path / "teacher.json").write_text('{"format": 9}')
            case "layers":
                del tensors[first]
                save_file(tensors, tmp_path / "teacher.safetensors")
            case "shape":
                save_file({**tensors, first: torch.zeros(3, 4)}, tmp_path / "teacher.safetensors")
            case "nan":
                save_file({**tensors, first: tensors[first] * math.nan}, tmp_path / "teacher.safetensors")
        with pytest.raises(AdapterError):
            load_ema(policy, tmp_path)


def test_a_rank_bound_that_cuts_is_reported(base: Qwen3ForCausalLM) -> None:
    policy = nudged(base)
    ema = make_ema(nudged(Qwen3ForCausalLM(base.config), seed=2))
    result = train(policy, OPTIONS.replace(teacher="ema", teacher_rate=0.5, teacher_rank=1), ema)
    assert [w.code for w in result.warnings] == ["teacher_truncated"]
    assert ema.lost > 0.01


def test_trust_region_is_the_normalised_geometric_mixture() -> None:
    g = torch.Generator().manual_seed(0)
    ref, student = torch.randn(5, generator=g), torch.randn(5, generator=g).requires_grad_()
    assert torch.equal(trust_region_logits(ref, student, 0.0), ref)
    torch.testing.assert_close(trust_region_logits(ref, student, 1.0), student.detach())
    p, q = torch.softmax(ref, -1), torch.softmax(student.detach(), -1)
    geometric = p**0.7 * q**0.3
    mixed = trust_region_logits(ref, student, 0.3)
    torch.testing.assert_close(torch.softmax(mixed, -1), geometric / geometric.sum())
    assert not mixed.requires_grad
