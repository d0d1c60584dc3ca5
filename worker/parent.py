"""The version that a run starts from: found, and checked against what the lease says it is."""

from __future__ import annotations

import json
from pathlib import Path

from api_schemas.worker import Lease, ParentVersion
from worker.errors import TrainingFailedError
from worker.versions import directory_of, scan, version_digest


def verified_parent(root: Path, lease: Lease) -> Path | None:
    """The parent's directory after its bytes were checked; None when the run starts from the base model.

    Raises TrainingFailedError: `parent_corrupt` when files are missing, added or changed, `base_mismatch` when it
    belongs to another base model. Neither is worth a retry.
    """
    if lease.parent is None:
        return None
    directory = _checked(root, lease.parent)
    config = json.loads((directory / "adapter" / "adapter_config.json").read_bytes())
    if (base := config.get("base_model_name_or_path")) != lease.base_model:
        raise base_mismatch(f"version {lease.parent.version} belongs to the base model {base!r}")
    return directory


def _checked(root: Path, parent: ParentVersion) -> Path:
    try:
        directory = directory_of(root, parent.uri)
        found = version_digest(scan(directory))
    except (OSError, ValueError) as error:
        raise _corrupt(parent, f"cannot be read: {type(error).__name__}") from error
    if found != parent.digest:
        raise _corrupt(parent, f"has digest {found}, not {parent.digest}")
    return directory


def _corrupt(parent: ParentVersion, what: str) -> TrainingFailedError:
    message = f"the files of version {parent.version} ({parent.uri}) are not what was committed: it {what}"
    return TrainingFailedError("parent_corrupt", message, retryable=False)


def base_mismatch(message: str) -> TrainingFailedError:
    return TrainingFailedError("base_mismatch", message, retryable=False)
