"""One lease, from its items to a version on disk, or to a preview. A function of the lease, the parent's files and the
base model.

The same lease gives the same bytes on the same machine: the seed is the lease's, the order of the items is the
lease's, and nothing of the clock goes into a file. Where memory is short, the plan (worker.plan) may cut the batch
another way, and sums round differently; the version records it.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import AdamW

from api_schemas.worker import FileEntry, ItemReport, Lease
from sdpo_core.ema import EmaTeacher, has_ema, load_ema, make_ema, save_ema
from sdpo_core.errors import AdapterError, SampleError
from sdpo_core.explain import explain
from sdpo_core.loop import train_batch
from sdpo_core.lora import LoraPolicy, LoraSpec, attached, save_lora
from sdpo_core.optimizer import load_optimizer, make_optimizer, save_optimizer
from sdpo_core.report import BatchResult, StepMetrics
from sdpo_core.saved import SavedLora
from sdpo_core.standing import update_standing
from worker.ahead import Ahead, Draft, ahead_of, draft_of
from worker.base_model import BaseModel
from worker.behaviour import behaviour_of
from worker.canary import canary_ids, record, score
from worker.card import write_card, write_provenance
from worker.errors import StoppedError, TrainingFailedError
from worker.items import probes_of, untold_prompts
from worker.mapping import lora_of, wire_metrics
from worker.messages import Done, Followed, Previewed, Progress, Step
from worker.parent import base_mismatch, verified_parent
from worker.preview import preview_of
from worker.ranks import check_alike, follows
from worker.versions import clear_leftovers, create_staging, directory_of, publish, staging_of, version_digest
from worker.warm import WarmVersion, warm_version

log = logging.getLogger(__name__)
Report = Callable[[Progress | Step], None]
PREVIEW_BATCH_TOKENS = 1024
"""Most tokens of one forward pass: a preview keeps whole distributions, three for each response token."""


@dataclass(frozen=True)
class _Prepared(Draft):
    """What is known before the model is touched."""

    parent: Path | WarmVersion | None

    @property
    def trainer_state(self) -> Path | None:
        """Where the parent's optimizer state lies, if it has one on disk."""
        if not isinstance(self.parent, Path) or not (self.parent / "trainer").is_dir():
            return None
        return self.parent / "trainer"


def run_job(
    lease: Lease, base: BaseModel, root: Path, *, report: Report, should_stop: Callable[[], bool],
    ahead: Ahead | None = None,
) -> Done | Followed:  # fmt: skip
    """Train the lease's batch on its parent and put the version under its final name. `ahead`: what was computed for
    this lease before, together with others.

    Raises TrainingFailedError with a code for the service, and StoppedError when `should_stop` says so between steps.
    The base model comes back bit-identical either way. Of several ranks the first one judges and writes; the others are
    done once the weights are (see worker.ranks).
    """
    with _named_failures():
        job = _prepare(lease, base, root)
        source = _source(job, base)
        canary = canary_ids(base, lease.canary_prompt)
        torch.manual_seed(lease.seed)
        known = ahead or ahead_of([job], base, report, should_stop)[0]
        standing = [] if follows(base.ranks) else _standing(job, base)
        with attached(base.module, source, base.fast_obstacle) as policy:
            before = score(policy, canary)
            optimizer, ema = _optimizer(policy, job), _moving_average(policy, job)
            started = time.monotonic()
            result = _train(policy, optimizer, ema, job, known, base, report, should_stop)
            seconds = time.monotonic() - started + known.seconds
            if follows(base.ranks):
                return Followed(run_id=lease.run_id)
            report(Progress(run_id=lease.run_id, phase="writing", step=len(result.steps), steps=job.options.steps))
            after = score(policy, canary)
            if base.ranks.rank > 0:
                return Followed(run_id=lease.run_id)
            files = _write(policy, optimizer, ema, job, root, len(standing))
            if base.warm.most_bytes:
                kept = warm_version(policy, lease.base_model, optimizer, ema)
                base.warm.keep(root, f"{lease.adapter_id}/{lease.run_id}", version_digest(files), kept)
    return Done(
        run_id=lease.run_id,
        uri=f"{lease.adapter_id}/{lease.run_id}",
        files=files,
        standing_feedback=standing,
        items=_item_reports(job, result),
        training_seconds=seconds,
        canary=record(base, canary, before, after),
    )


def run_preview(lease: Lease, base: BaseModel, root: Path, *, report: Report) -> Previewed | Followed:
    """What the lease's batch would teach its parent. No gradient; nothing is written, nothing moves.

    Raises TrainingFailedError with a code for the service.
    """
    if follows(base.ranks):
        return Followed(run_id=lease.run_id)
    with _named_failures():
        job = _prepare(lease, base, root)
        report(Progress(run_id=lease.run_id, phase="scoring"))
        source = _source(job, base)
        untold = untold_prompts(lease, base, job.samples)
        options = job.options.replace(micro_batch_tokens=min(job.options.micro_batch_tokens, PREVIEW_BATCH_TOKENS))
        with attached(base.module, source, base.fast_obstacle) as policy:
            ema = _moving_average(policy, job)
            shown = explain(policy, base.tokenizer, job.samples, options, ema=ema, untold_prompts=untold)
    if base.ranks.rank > 0:
        return Followed(run_id=lease.run_id)
    return Previewed(run_id=lease.run_id, preview=preview_of(lease, shown, base.tokenizer))


def _prepare(lease: Lease, base: BaseModel, root: Path) -> _Prepared:
    if lease.base_model != base.name:
        raise base_mismatch(f"this worker holds {base.name!r}, the lease is for {lease.base_model!r}")
    try:
        staging_of(root, lease.adapter_id, lease.run_id, lease.token)
    except ValueError as error:
        raise TrainingFailedError("bad_lease", str(error), retryable=False) from error
    if base.ranks.rank == 0:  # who writes clears up
        clear_leftovers(root, lease.adapter_id, lease.token)
    draft = draft_of(lease, base)
    parent = base.warm.find(root, lease.parent) or verified_parent(root, lease)
    return _Prepared(lease, draft.samples, draft.options, parent)


def _source(job: _Prepared, base: BaseModel) -> LoraSpec | Path | SavedLora:
    """What the job starts from."""
    if job.parent is None:
        return _fresh_lora(job.lease, base)
    return job.parent.lora if isinstance(job.parent, WarmVersion) else job.parent / "adapter"


def _fresh_lora(lease: Lease, base: BaseModel) -> LoraSpec:
    """A new adapter. Raises AdapterError for a target module that the base model has no linear layer of."""
    present = {name.rsplit(".")[-1] for name, module in base.module.named_modules() if isinstance(module, nn.Linear)}
    if absent := sorted(set(lease.lora.target_modules) - present):
        raise AdapterError(f"the base model has no linear layer {absent[0]!r}: create the adapter with other modules")
    return lora_of(lease.lora, lease.seed)


def _optimizer(policy: LoraPolicy, job: _Prepared) -> AdamW:
    """Moments come from the parent, every hyperparameter from the lease. An uploaded parent has no moments."""
    saved = job.parent.moments if isinstance(job.parent, WarmVersion) else job.trainer_state
    return make_optimizer(policy, job.options) if saved is None else load_optimizer(policy, job.options, saved)


def _moving_average(policy: LoraPolicy, job: _Prepared) -> EmaTeacher | None:
    """The state of teacher `ema`: the parent's, or a start at the parent's own weights where it has none."""
    if job.options.teacher != "ema":
        return None
    if isinstance(job.parent, WarmVersion):
        return make_ema(policy) if job.parent.ema is None else job.parent.ema.on(policy.device)
    if job.trainer_state is None or not has_ema(job.trainer_state):
        return make_ema(policy)
    return load_ema(policy, job.trainer_state)


def _train(
    policy: LoraPolicy,
    optimizer: AdamW,
    ema: EmaTeacher | None,
    job: _Prepared,
    known: Ahead,
    base: BaseModel,
    report: Report,
    should_stop: Callable[[], bool],
) -> BatchResult:
    run_id, steps = job.lease.run_id, job.options.steps

    def on_step(step: StepMetrics) -> None:
        report(Step(run_id=run_id, metrics=wire_metrics(step)))
        report(Progress(run_id=run_id, phase="training", step=step.step, steps=steps))

    result = train_batch(
        policy, optimizer, known.learnt, known.options, ema=ema, targets=known.targets, anchors=known.anchors,
        on_step=on_step, should_stop=should_stop, ranks=base.ranks,
    )  # fmt: skip
    if result.stop_reason == "cancelled":
        raise StoppedError
    if result.skipped_non_finite and result.skipped_non_finite == len(result.steps):
        raise _diverged("loss or gradient is not finite in any step")
    for name, parameter in policy.trainable():
        if not bool(torch.isfinite(parameter).all()):
            raise _diverged(f"{name} is not finite after the last step")
    check_alike(policy, base.ranks)
    for warning in result.warnings:
        log.warning("run %s: %s", run_id, warning)
    return result


def _standing(job: _Prepared, base: BaseModel) -> list[str]:
    """What the next batch's teacher is told besides its own remarks. Remarks on one answer alone never join."""
    lease = job.lease
    new = [item.feedback for item in lease.items if item.standing]
    probes = probes_of(lease, job.samples)
    return list(update_standing(base.bare(), base.tokenizer, lease.standing_feedback, new, probes).remarks)


def _write(
    policy: LoraPolicy, optimizer: AdamW, ema: EmaTeacher | None, job: _Prepared, root: Path, standing_count: int
) -> list[FileEntry]:
    """The version directory, durable and under its final name. A batch that taught nothing is written as well: its
    version equals its parent, and the batch counts as applied."""
    lease = job.lease
    staging = staging_of(root, lease.adapter_id, lease.run_id, lease.token)
    create_staging(staging)
    save_lora(policy, staging / "adapter", base_model_name_or_path=lease.base_model)
    write_card(staging / "adapter", lease)
    write_provenance(staging / "adapter", lease, job.options.as_dict(), standing_count)
    save_optimizer(policy, optimizer, staging / "trainer")
    if ema is not None:
        save_ema(ema, staging / "trainer")
    return publish(staging, directory_of(root, f"{lease.adapter_id}/{lease.run_id}"))


def _item_reports(job: _Prepared, result: BatchResult) -> list[ItemReport]:
    return [
        ItemReport(
            id=item.id,
            behaviour=behaviour_of(item, job.lease),
            taught=outcome.taught,
            response_tokens=len(sample.response_ids),
        )
        for item, sample, outcome in zip(job.lease.items, job.samples, result.samples[: len(job.samples)], strict=True)
    ]


@contextmanager
def _named_failures() -> Iterator[None]:
    """Give the failures that a job can foresee their codes."""
    try:
        yield
    except AdapterError as error:
        raise TrainingFailedError("adapter_refused", str(error), retryable=False) from error
    except SampleError as error:
        raise TrainingFailedError("bad_item", str(error), retryable=False) from error
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            message = "no space left where adapter versions are written: make room, the job is tried again"
            raise TrainingFailedError("disk_full", message, retryable=True) from error
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = "out of memory: use fewer or shorter items, or a larger machine"
        raise TrainingFailedError("out_of_memory", message, retryable=True) from error


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """Whether a write failed for want of space. safetensors tells the system's error only in its text."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _diverged(message: str) -> TrainingFailedError:
    return TrainingFailedError("diverged", f"{message}: lower the learning rate", retryable=False)
