"""Decoder layers through torch.compile against the same layers as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import Qwen3ForCausalLM

from sdpo_core import Options, Sample, StepMetrics, make_optimizer, teacher_targets, train_batch
from sdpo_core.bare import BarePolicy
from sdpo_core.fast import compiled
from tests.sdpo_core.conftest import adapter
from tests.sdpo_core.fast.test_path import batch, model

pytestmark = pytest.mark.filterwarnings("default")  # torch.compile has warnings of its own
OPTIONS = Options(path="fast", top_k=9, steps=2, stop_gap=0.0, learning_rate=1e-3, measure_base_kl=True)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    """What was compiled for another test or with another backend is forgotten."""
    compiled.forget()
    counters.clear()
    yield
    compiled.forget()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but its code generator, which takes most of the time."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def trained(base: Qwen3ForCausalLM, samples: list[Sample], options: Options) -> tuple[tuple[StepMetrics, ...], Tensor]:
    """Steps, and the gradient of the last one."""
    policy = adapter(base)
    steps = train_batch(policy, make_optimizer(policy, options), samples, options).steps
    gradient = torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None])
    assert policy.base_intact()
    policy.detach()
    return steps, gradient


def equal(base: Qwen3ForCausalLM, samples: list[Sample], **changes: Any) -> None:
    """Compiled and not: the gradient and the loss of each step."""
    options = OPTIONS.replace(**changes)
    found, gradient = trained(base, samples, options.replace(compile_layers=True))
    expected, expected_gradient = trained(base, samples, options)
    assert [s.plan.compiled for s in (*found, *expected) if s.plan] == [True, True, False, False]
    assert {s.fallback_reason for s in found} == {""}
    torch.testing.assert_close([s.loss for s in found], [s.loss for s in expected], rtol=1e-5, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_equals_layers_as_they_are(traced: None) -> None:
    """And neither other lengths, other numbers of answers, other micro-batches, another adapter of the same kind, nor
    computing layers again is compiled anew."""
    base = model(layers=3)
    equal(base, batch())
    assert (known := graphs()) > 0
    equal(base, batch(seed=1)[:4])
    equal(base, batch(seed=2), micro_batch_tokens=40)
    equal(base, batch(), checkpointing=True)
    assert graphs() == known
    assert not any("forward" in vars(module) for module in base.modules())


def test_the_bare_base_is_read_compiled(traced: None) -> None:
    base, samples = model(layers=3), batch()
    found = teacher_targets(BarePolicy(base, ""), samples, OPTIONS.replace(compile_layers=True))
    assert graphs() > 0
    for one, other in zip(found, teacher_targets(BarePolicy(base, ""), samples, OPTIONS), strict=True):
        torch.testing.assert_close(one.target.logp, other.target.logp, rtol=1e-5, atol=1e-5)


def as_it_is(steps: tuple[StepMetrics, ...], why: str) -> None:
    """On the fast path, not compiled, and said to be so."""
    assert [s.path for s in steps] == ["fast", "fast"]
    assert not any(s.plan.compiled for s in steps if s.plan)
    assert all(why in s.fallback_reason for s in steps)


def test_a_batch_goes_on_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once."""
    tries = []

    def no_compiler(*_: object) -> Callable[..., Any]:
        tries.append(1)
        raise OSError("no C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", no_compiler)
    base = model(layers=3)
    _, expected = trained(base, batch(), OPTIONS)
    for _ in range(2):
        steps, gradient = trained(base, batch(), OPTIONS.replace(compile_layers=True))
        assert torch.equal(gradient, expected)
        as_it_is(steps, "cannot be compiled: OSError")
    assert len(tries) == 1
    assert not any("forward" in vars(module) for module in base.modules())


def test_a_failure_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(graph: Any, _: object) -> Callable[..., Any]:
        if any("tangents" in node.name for node in graph.graph.nodes):
            raise BackendCompilerFailed(forward_only, OSError("no space left on device"), None)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=forward_only, bw_compiler=forward_only))
    base = model(layers=3)
    steps, gradient = trained(base, batch(), OPTIONS.replace(compile_layers=True))
    assert torch.equal(gradient, trained(base, batch(), OPTIONS)[1])
    as_it_is(steps, "cannot be compiled: OSError")


def test_past_the_limit_a_batch_says_so_and_what_is_compiled_is_kept(
    traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the passes of a batch: the teacher's, the first layer's with gradient, the others' with gradient."""
    monkeypatch.setattr(compiled, "LIMIT", 3)
    base = model(layers=3)
    equal(base, batch(), measure_base_kl=False)
    options = OPTIONS.replace(compile_layers=True, teacher="previous", measure_base_kl=False)
    as_it_is(trained(base, batch(), options)[0], "cannot be compiled: FailOnRecompileLimitHit")
    equal(base, batch(), measure_base_kl=False)


def test_a_model_of_one_layer_has_nothing_to_compile(traced: None) -> None:
    as_it_is(trained(model(layers=1), batch(), OPTIONS.replace(compile_layers=True))[0], "no decoder layers")


def test_the_plain_path_compiles_nothing(traced: None) -> None:
    (step, *_), _ = trained(model(layers=3), batch(), OPTIONS.replace(compile_layers=True, path="plain"))
    assert step.plan is not None
    assert not step.plan.compiled
    assert graphs() == 0


@pytest.mark.slow
def test_generated_code() -> None:
    """Against the plain path, which is not compiled."""
    steps, _ = trained(model(layers=3), batch(), OPTIONS.replace(compile_layers=True, audit=True))
    assert graphs() > 0
    assert all(s.plan is not None and s.plan.compiled for s in steps)
    assert all(s.audit is not None and 0.0 < s.audit.gradient <= 1e-5 for s in steps)
