"""Continuous batching: one thread, one step at a time; requests join and leave the batch between steps.

A step first lets waiting requests in (one forward over their whole prompts), then generates one token for every running
request. Running requests are slots 0..n-1 of the cache, in the order of `_running`.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch

from worker.engine.errors import EngineDeadError, EngineError, GenerationFailedError, QueueFullError
from worker.engine.generation import Generation
from worker.engine.runner import ModelRunner, Row
from worker.engine.sampling import draw

_log = logging.getLogger(__name__)

# Padded tokens of one prefill forward: bounds its memory and how long running streams wait for it.
_PREFILL_TOKENS = 4096


class DecodeLoop:
    """Owns the runner. At most `runner.cache.slots` requests run, with at most `max_loras` different adapters, and at
    most `max_waiting` wait. Waiting requests are served strictly in order: none can be overtaken for ever.
    """

    def __init__(self, runner: ModelRunner, *, max_loras: int, max_waiting: int) -> None:
        self._runner = runner
        self._max_loras = max_loras
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # touched by the loop's thread only
        self._wake = threading.Condition()
        self._closing = False
        self.generated_tokens = 0  # since the start, for /metrics
        self._thread = threading.Thread(target=self._run, name="perennial-decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; requests that are still there fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are still being decoded."""
        return self._thread.is_alive() and not self._closing

    @property
    def counts(self) -> tuple[int, int]:
        """(running, waiting) requests at this moment."""
        return len(self._running), len(self._waiting)

    def submit(self, generation: Generation) -> None:
        """Queue a request. Raises QueueFullError or EngineDeadError, and then has kept nothing."""
        with self._wake:
            if not self.alive:
                raise EngineDeadError("The engine has stopped; restart it.")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already; retry later.")
            self._waiting.append(generation)
            self._wake.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
            reason: EngineError = EngineDeadError("The engine is shutting down.")
        except Exception:
            _log.exception("the decoding loop has died")
            reason = EngineDeadError("The engine has stopped after an internal error; restart it.")
        with self._wake:
            self._closing = True
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for generation in left:
            generation.fail(reason)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._waiting or self._running)
            return not self._closing

    def _step(self) -> None:
        try:
            self._drop_aborted()
            self._prefill(self._admit())
            self._decode()
        except torch.OutOfMemoryError:
            self._fail_batch()

    def _drop_aborted(self) -> None:
        self._remove([slot for slot, generation in enumerate(self._running) if generation.aborted])

    def _admit(self) -> list[Generation]:
        """The next waiting requests, in order, as far as slots, adapters and the prefill budget allow."""
        admitted: list[Generation] = []
        adapters = {generation.weights for generation in self._running} - {None}
        longest = 0
        with self._wake:
            while self._waiting and len(self._running) + len(admitted) < self._runner.cache.slots:
                head = self._waiting[0]
                if head.aborted:
                    self._waiting.popleft()
                    continue
                longest = max(longest, len(head.prompt_ids))
                adapters |= {head.weights} - {None}
                too_long = bool(admitted) and longest * (len(admitted) + 1) > _PREFILL_TOKENS
                if too_long or len(adapters) > self._max_loras:
                    break
                admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, admitted: Sequence[Generation]) -> None:
        if not admitted:
            return
        first_slot = len(self._running)
        self._running.extend(admitted)
        for generation in admitted:
            generation.prepare(self._runner.device)
        self._advance(first_slot, [Row(generation.prompt_ids, 0, generation.weights) for generation in admitted])

    def _decode(self) -> None:
        if self._running:
            rows = [Row((it.last_token,), it.length - 1, it.weights) for it in self._running]
            self._advance(0, rows)

    def _advance(self, first_slot: int, rows: Sequence[Row]) -> None:
        """One forward and one token for the requests in the slots from `first_slot` on; the finished ones leave."""
        generations = self._running[first_slot : first_slot + len(rows)]
        logits_BV = self._runner.forward(first_slot, rows)
        draws = draw(
            logits_BV,
            [generation.sampling for generation in generations],
            [generation.generator for generation in generations],
            [generation.top_count for generation in generations],
            [generation.forced_next for generation in generations],
        )
        self.generated_tokens += len(rows)
        over = [generation.accept(drawn) for generation, drawn in zip(generations, draws, strict=True)]
        self._remove([first_slot + index for index, finished in enumerate(over) if finished])

    def _remove(self, slots: Sequence[int]) -> None:
        """Free slots; from the highest down, so that the last request, which fills the hole, is one that stays."""
        for slot in sorted(slots, reverse=True):
            last = len(self._running) - 1
            self._runner.cache.release(slot, last)
            self._running[slot] = self._running[last]
            self._running.pop()

    def _fail_batch(self) -> None:
        """Out of memory: give up the running requests, free what they held, go on with the waiting ones."""
        _log.error("out of memory with %d requests running; they fail", len(self._running))
        failed, self._running = self._running, []
        self._runner.cache.clear()
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()
        for generation in failed:
            generation.fail(GenerationFailedError("The engine ran out of memory; send fewer or shorter requests."))
