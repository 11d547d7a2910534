"""Every failure that crosses a seam, each with its stable code.

    WorkerError
    ├── InvalidRequest      INVALID_REQUEST     the payload, not the worker, is wrong
    ├── ModelLoadFailed     MODEL_LOAD_FAILED   the file can't be served: what, where, expected
    ├── InsufficientVram    INSUFFICIENT_VRAM   refused before anything was copied: required, available
    ├── VramOom             VRAM_OOM            an allocation failed while a job ran
    ├── CudaError           CUDA_ERROR          the device is lost; the process must end
    ├── InferenceTimeout    INFERENCE_TIMEOUT   a deadline or a time limit passed
    ├── Cancelled           CANCELLED           by request
    ├── DeadLettered        DEAD_LETTERED       attempts without progress, or too many deliveries
    ├── QueueFull           QUEUE_FULL          in the client, with a retry-after
    ├── ConfigInvalid       CONFIG_INVALID      settings that can't be: one sentence a mistake
    └── Internal            INTERNAL            anything else; the trace goes to the log only

`message` is one sentence for a person; `details` is what a program may want. Codes never change meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class WorkerError(Exception):
    """The root of the tree; never raised itself. `exit_code` is what a command ends with that fails by it."""

    code: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})


class InvalidRequest(WorkerError):
    """The request is refused before any work; `details["errors"]` lists every wrong field."""

    code = "INVALID_REQUEST"
    exit_code = 3

    @classmethod
    def of(cls, *errors: tuple[str, str, Any]) -> InvalidRequest:
        """Build from (field, constraint, value) triples, all of them, in the order of the fields."""
        listed = [{"field": field, "constraint": constraint, "value": value} for field, constraint, value in errors]
        sentence = "; ".join(f"{field}: {constraint}" for field, constraint, _ in errors)
        return cls(sentence, {"errors": listed})


class ModelLoadFailed(WorkerError):
    """A model file can't be served. One sentence says what is wrong, where, and what was expected."""

    code = "MODEL_LOAD_FAILED"

    def __init__(self, what: str, where: str, expected: str) -> None:
        super().__init__(f"{where}: {what}; expected {expected}", {"what": what, "where": where, "expected": expected})


class InsufficientVram(WorkerError):
    """The model does not fit on the device; nothing was copied. Sizes are bytes."""

    code = "INSUFFICIENT_VRAM"

    def __init__(self, required: int, available: int, what: str) -> None:
        super().__init__(
            f"{what} needs {required:,} bytes of device memory and {available:,} are available",
            {"required": required, "available": available, "what": what},
        )


class VramOom(WorkerError):
    """An allocation failed during a job, or the KV pool ran out; the worker stays up."""

    code = "VRAM_OOM"
    retriable = True


class CudaError(WorkerError):
    """A sticky device error: nothing on this device works any more, so the process ends."""

    code = "CUDA_ERROR"
    exit_code = 2


class InferenceTimeout(WorkerError):
    """The job's deadline or the worker's time limit for one attempt passed."""

    code = "INFERENCE_TIMEOUT"


class Cancelled(WorkerError):
    """The job was cancelled by request."""

    code = "CANCELLED"


class DeadLettered(WorkerError):
    """The job ended attempt after attempt without one new token, or was delivered too often."""

    code = "DEAD_LETTERED"


class QueueFull(WorkerError):
    """Raised by the client when the queue is at its bound; try again after `retry_after_s`."""

    code = "QUEUE_FULL"
    retriable = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, {"retry_after_s": retry_after_s})
        self.retry_after_s = retry_after_s


class ConfigInvalid(WorkerError):
    """Flags, environment or settings file are wrong; raised before anything starts."""

    code = "CONFIG_INVALID"
    exit_code = 4


class Internal(WorkerError):
    """A fault of the worker itself. The message names the kind of fault; the trace is only logged."""

    code = "INTERNAL"
    retriable = True
