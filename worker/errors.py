"""The worker's exceptions. Each carries what the service or the operator needs to hear, never user text."""

from __future__ import annotations

PEER_LOST = 17
"""Exit status of a process that ends because another rank has."""


class WorkerError(Exception):
    """Base of everything the worker raises on purpose."""


class ServiceUnavailableError(WorkerError):
    """No answer, or one that says to come back: a network error, 408, 429 or 5xx."""


class LeaseLostError(WorkerError):
    """The service has given the adapter's lease to a newer token: this run can change nothing any more."""


class VersionRejectedError(WorkerError):
    """The service's admission check refused the version; it has failed the job itself."""


class UnauthorisedError(WorkerError):
    """The worker token is wrong or lacks the right to lease: an operator has to act."""


class RefusedError(WorkerError):
    """Any other 4xx: the two sides do not speak the same protocol."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code} ({status}): {message}")
        self.code = code


class TrainerDiedError(WorkerError):
    """The training process ended without an answer; the message names its signal or exit status."""


class TrainerTakenError(TrainerDiedError):
    """The worker ended the training process for another run's sake: this one is not to blame."""


class TrainerUnavailableError(WorkerError):
    """The training process could not load the base model: no lease may be taken."""


class TrainingFailedError(WorkerError):
    """A job that cannot be finished, reported by the training process.

    `code` is stable and machine-readable; `retryable` says whether another attempt can help.
    """

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class StoppedError(WorkerError):
    """Raised between steps when the supervisor has asked the training process to stop."""


class DoesNotFitError(WorkerError):
    """The memory that is there cannot hold what was planned; the message is the plan and what to change."""
