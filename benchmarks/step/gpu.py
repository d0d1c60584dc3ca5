"""One batch on a randomly initialised Qwen3-8B shape: step time, tokens/s, MFU, peak memory, and the kernels alone.

`python -m benchmarks.step --gpu`. Nothing is downloaded: weights are random, bf16, from the configuration alone. MFU is
held against a GEMM measured in the same run, not against a data sheet; the kernels' time against the time that their
least traffic takes at a memory rate measured in the same run. It has never run on a GPU yet: the tests run the same
code on a CPU with a tiny shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step.shapes import QWEN3_8B, Case, Shape, build
from benchmarks.step.variants import FAST
from sdpo_core.fast import rows, rows_triton

MICRO_BATCH_TOKENS = 2048
Figures = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What is measured and on what; the defaults are the issue's."""

    shape: Shape = QWEN3_8B
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    gemm: int = 8192
    rows: int = 512
    repetitions: int = 3
    compile_layers: bool = True
    """Whether the step is measured with compiled layers as well."""


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: `make bench` measures on the CPU")
    for name, value in measured(Setting()).items():
        print(f"{name}: {value:.4g}")


def measured(setting: Setting) -> Figures:
    """All figures; seconds, tokens per second, shares, MB."""
    figures = {"gemm_tflops": gemm_rate(setting) / 1e12, "memory_tbs": memory_rate(setting) / 1e12}
    figures |= kernel_figures(setting, figures["memory_tbs"] * 1e12)
    case = build(setting.shape, device=setting.device, dtype=setting.dtype)
    for compiled in (False, True) if setting.compile_layers else (False,):
        for steps in (1, 4):
            found = step_figures(case, steps, figures["gemm_tflops"] * 1e12, setting, compiled=compiled)
            figures |= {f"compiled_{name}" if compiled else name: value for name, value in found.items()}
    return figures


def step_figures(case: Case, steps: int, gemm_rate: float, setting: Setting, *, compiled: bool = False) -> Figures:
    """One batch, the teacher's pass and the optimizer included; the first of its kind is not counted."""
    options = FAST.replace(steps=steps, micro_batch_tokens=MICRO_BATCH_TOKENS, compile_layers=compiled)

    def run() -> None:
        case.reset()
        case.train(options)

    run()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = least_seconds(run, setting)
    peak = torch.cuda.max_memory_allocated() / 1e6 if setting.device == "cuda" else float("nan")
    tokens = case.shape.rows * (case.shape.prompt + case.shape.response)
    return {
        f"step_seconds_{steps}": seconds,
        f"tokens_per_second_{steps}": tokens * steps / seconds,
        f"mfu_{steps}": useful_flops(case.shape, steps) / seconds / gemm_rate,
        f"peak_mb_{steps}": peak,
    }


def useful_flops(shape: Shape, steps: int) -> float:
    """Of the matrix products that cannot be left out: the teacher's forward once, per step the student's forward and
    the backward into the activations (the frozen weights get no gradient), heads on response tokens without a dense
    backward. Attention and the adapter itself, a few percent, are not counted."""
    query, key = shape.heads * shape.head_size, (shape.kv_heads or max(1, shape.heads // 4)) * shape.head_size
    layer = shape.hidden * (2 * query + 2 * key + 3 * (shape.intermediate or 3 * shape.hidden))
    body, head = 2 * layer * shape.layers, 2 * shape.hidden * shape.vocabulary
    student, teacher = shape.prompt + shape.response, shape.teacher_prompt + shape.response
    per_row = body * (teacher + 2 * steps * student) + head * shape.response * (1 + steps)
    return float(per_row * shape.rows)


def kernel_figures(setting: Setting, memory_rate: float) -> Figures:
    """Largest error against the torch version in float64, and the time as a multiple of the memory's floor."""
    draw = torch.Generator(setting.device).manual_seed(0)
    size = (setting.rows, setting.shape.vocabulary)
    logits_NV = torch.randn(size, generator=draw, device=setting.device).mul_(4).to(setting.dtype)
    index_NK = logits_NV.float().topk(min(100, size[1]), dim=-1).indices
    ids_N = torch.randint(size[1], size[:1], generator=draw, device=setting.device)
    kernels = rows_triton.rows_for(logits_NV)
    found = kernels.row_stats(logits_NV, index_NK, ids_N)
    expected = rows.row_stats(logits_NV.double(), index_NK, ids_N)
    error = max(float((vars(found)[n] - v).abs().max()) for n, v in vars(expected).items())
    spread_N, at_NK = torch.ones_like(found.lse_N), torch.zeros_like(found.picked_NK)

    def grad(logits: Tensor) -> Tensor:
        return kernels.row_grad_(logits, found.top_N + found.lse_N, spread_N, index_NK, at_NK, ids_N, spread_N)

    exact_NV = rows.row_grad_(
        logits_NV.double(),
        expected.top_N + expected.lse_N,
        spread_N.double(),
        index_NK,
        at_NK.double(),
        ids_N,
        spread_N.double(),
    )
    grad_error = float((grad(logits_NV.clone()) - exact_NV).abs().max())
    stats_seconds = least_seconds(lambda: kernels.row_stats(logits_NV, index_NK, ids_N), setting)
    grad_seconds = least_seconds(lambda: grad(logits_NV), setting)
    kept = index_NK.shape[1]
    return {
        "row_stats_error": error,
        "row_stats_over_floor": stats_seconds * memory_rate / rows_triton.bytes_of_stats(logits_NV, kept),
        "row_grad_error": grad_error,
        "row_grad_over_floor": grad_seconds * memory_rate / rows_triton.bytes_of_grad(logits_NV, kept),
    }


def gemm_rate(setting: Setting) -> float:
    """FLOP/s of a square product in the model's dtype."""
    n = setting.gemm
    a, b = (torch.randn(n, n, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return 2 * n**3 / least_seconds(lambda: a @ b, setting)


def memory_rate(setting: Setting) -> float:
    """Bytes/s of a copy, reading and writing."""
    source = torch.zeros(setting.gemm * setting.gemm * 4, device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / least_seconds(lambda: target.copy_(source), setting)


def least_seconds(run: Callable[[], object], setting: Setting) -> float:
    """Wall seconds, the device waited for; the least of the repetitions after one that is not counted."""
    found = []
    for _ in range(setting.repetitions + 1):
        started = time.perf_counter()
        run()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])
