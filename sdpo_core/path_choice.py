"""Which path a batch takes, and what happens when memory runs out on it or its layers cannot be compiled."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sdpo_core.audit import AuditedPath
from sdpo_core.ema import EmaTeacher
from sdpo_core.fast.compiled import why_not_compiled
from sdpo_core.fast.path import FastPath, obstacle
from sdpo_core.fast.scores import LEAST_CHUNK
from sdpo_core.options import Options
from sdpo_core.paths import Path
from sdpo_core.plain import PlainPath
from sdpo_core.policy import Policy
from sdpo_core.report import Audit
from sdpo_core.samples import Sample

log = logging.getLogger(__name__)
R = TypeVar("R")
_CPU_ALLOCATOR = "can't allocate memory"


@dataclass
class Route:
    """The path of a batch. `path` is replaced by one that does less at a time when memory runs out, and by one without
    compiled layers when they cannot be had."""

    path: Path
    fallback_reason: str

    def tried(self, work: Callable[[Path], R], samples: Sequence[Sample]) -> R:
        """`work(path)`, and again on another path for as long as there is `_another` to try."""
        while True:
            try:
                return work(self.path)
            except Exception as error:
                if (options := self._another(error, samples)) is None:
                    raise
            # Out of the handler, so that the failed attempt's frames, and their tensors, are gone.
            self.path = self.path.with_options(options)
            release_memory()

    def _another(self, error: Exception, samples: Sequence[Sample]) -> Options | None:
        """What to go on with: less at a time when memory ran out, layers as they are when they cannot be compiled.
        None where the error says something else or nothing is left to try."""
        if out_of_memory(error):
            return smaller(self.path, samples)
        if not (self.path.options.compile_layers and (reason := why_not_compiled(error))):
            return None
        log.warning("%s; the batch goes on without: %s", reason, error)
        self.fallback_reason = reason
        return self.path.options.replace(compile_layers=False)

    def audit(self) -> Audit | None:
        return self.path.log.take() if isinstance(self.path, AuditedPath) else None


def choose(policy: Policy, options: Options, ema: EmaTeacher | None) -> Route:
    """The fast path where the options allow it and nothing stands in its way. Raises OptionError (see Scorer)."""
    plain = PlainPath(policy, options, ema)
    if options.path == "plain":
        return Route(plain, "")
    if reason := obstacle(policy):
        return Route(plain, reason)
    fast = FastPath(policy, options, ema)
    return Route(AuditedPath(fast, plain) if options.audit else fast, "")


def smaller(path: Path, samples: Sequence[Sample]) -> Options | None:
    """Options that need less memory at a time: smaller micro-batches first, then checkpointing, then smaller chunks.

    None when there is nothing left to try.
    """
    options = path.options
    if any(len(rows) > 1 for rows in path.groups(samples)):
        used = min(options.micro_batch_tokens, sum(s.student_length for s in samples))
        return options.replace(micro_batch_tokens=max(used // 2, 1))
    if path.name == "plain":
        return None
    if not options.checkpointing:
        return options.replace(checkpointing=True)
    chunk = options.chunk_tokens or max(len(s.response_ids) for s in samples)
    return options.replace(chunk_tokens=max(chunk // 2, LEAST_CHUNK)) if chunk > LEAST_CHUNK else None


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out: on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error)


def release_memory() -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
