"""The Triton kernels compiled to machine code for a Hopper GPU, without one: `python -m benchmarks.step.machine_code`.

Prints what decides their speed: exponentials in the loop over the vocabulary (the special-function units give about as
many per second as the memory gives bf16 logits), and bytes spilled to local memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdpo_core.fast import kernels

BLOCK_V, BLOCK_K, WARPS = 4096, 128, 8
TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel: Any, dtype: str) -> Any:
    """The kernel for logits of `dtype`, as on a vocabulary of 152k with K = 100."""

    def kind(name: str) -> str:
        if name.startswith("BLOCK"):
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        return {"logits_ptr": f"*{dtype}", "index_ptr": "*i64", "ids_ptr": "*i64"}.get(name, "*fp32")

    sizes = {"BLOCK_V": BLOCK_V, "BLOCK_K": BLOCK_K}
    source = ASTSource(fn=kernel, signature={n: kind(n) for n in kernel.arg_names}, constexprs=sizes)
    return triton.compile(source, target=TARGET, options={"num_warps": WARPS})


def loop_exponentials(ptx: str) -> float:
    """Exponentials per logit between the loop's label and the jump back to it."""
    loop = re.search(r"// =>This Inner Loop Header(.*?)bra\S*\s+\$L__BB", ptx, re.DOTALL)
    assert loop is not None, "the kernel has no loop"
    return loop[1].count("ex2.approx") / (BLOCK_V / (32 * WARPS))


def spilled(cubin: bytes) -> int:
    """Bytes of local memory, spills and stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ask = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(ask, capture_output=True, text=True, check=True).stdout  # noqa: S603 - triton's own tool
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def main() -> None:
    for kernel in (kernels.row_stats_kernel, kernels.row_grad_kernel):
        for dtype in ("bf16", "fp32"):
            code = compiled(kernel, dtype)
            per_logit = loop_exponentials(code.asm["ptx"])
            print(
                f"{kernel.__name__} {dtype} sm_{TARGET.arch}: {per_logit:g} exponential per logit, "
                f"{spilled(code.asm['cubin'])} bytes spilled"
            )


if __name__ == "__main__":
    main()
