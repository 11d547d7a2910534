"""Errors that cross a package boundary, each with a stable code.

    WorkerError
    ├── InvalidRequest      INVALID_REQUEST     the job's fields are invalid
    ├── ModelLoadFailed     MODEL_LOAD_FAILED   the file can't be served: what, where, expected
    ├── InsufficientVram    INSUFFICIENT_VRAM   the model does not fit: required, available bytes
    ├── VramOom             VRAM_OOM            an allocation failed while a job ran
    ├── CudaError           CUDA_ERROR          the device is lost; the process exits
    ├── InferenceTimeout    INFERENCE_TIMEOUT   a deadline or a time limit passed
    ├── Cancelled           CANCELLED           cancelled by the client
    ├── DeadLettered        DEAD_LETTERED       attempts without progress, or too many deliveries
    ├── QueueFull           QUEUE_FULL          raised by the client, with a retry delay
    ├── ConfigInvalid       CONFIG_INVALID      invalid settings: one sentence each
    ├── ServerRefused       REDIS_REFUSED       the server refuses a command: details["reply"]
    ├── EventsLost          EVENTS_LOST         the job's stream ended without a terminal event
    └── Internal            INTERNAL            any other error; the traceback is only logged

`message` is one sentence for a person, `details` hold the same values for a program. A code never
changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class WorkerError(Exception):
    """Base class, never raised itself. A command that fails with it exits with `exit_code`."""

    code: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})


class InvalidRequest(WorkerError):
    """The job is rejected before it runs; `details["errors"]` lists every invalid field."""

    code = "INVALID_REQUEST"
    exit_code = 3

    @classmethod
    def of(cls, *errors: tuple[str, str, Any]) -> InvalidRequest:
        """Build from (field, constraint, value) triples, in the order of the fields."""
        listed = [{"field": field, "constraint": constraint, "value": value} for field, constraint, value in errors]
        sentence = "; ".join(f"{field}: {constraint}" for field, constraint, _ in errors)
        return cls(sentence, {"errors": listed})


class ModelLoadFailed(WorkerError):
    """A model file can't be served: what is wrong, where, and what was expected."""

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
    """A sticky CUDA error: the context is unusable, so the process exits."""

    code = "CUDA_ERROR"
    exit_code = 2


class InferenceTimeout(WorkerError):
    """The job's deadline or the worker's time limit for one attempt passed."""

    code = "INFERENCE_TIMEOUT"


class Cancelled(WorkerError):
    """The job was cancelled by the client."""

    code = "CANCELLED"


class DeadLettered(WorkerError):
    """Repeated attempts of the job made no progress, or it was delivered too often."""

    code = "DEAD_LETTERED"


class QueueFull(WorkerError):
    """The queue is at its maximum length; retry after `retry_after_s`. Raised by the client."""

    code = "QUEUE_FULL"
    retriable = True
    exit_code = 3

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message}; retry after {retry_after_s:g} s", {"retry_after_s": retry_after_s})
        self.retry_after_s = retry_after_s


class ConfigInvalid(WorkerError):
    """A flag, environment variable or settings file is invalid; raised before the worker starts."""

    code = "CONFIG_INVALID"
    exit_code = 4


class ServerRefused(WorkerError):
    """Redis refuses a command, and a repetition would not help: rights, password, type of a key.

    `details["reply"]` is the first word of the reply, such as NOPERM, WRONGPASS or WRONGTYPE. An
    unreachable or temporarily refusing server is `worker.jobs.streams.Disconnected` instead.
    """

    code = "REDIS_REFUSED"
    exit_code = 5


class EventsLost(WorkerError):
    """A job's events are missing or have expired, so its answer can't be read to its end."""

    code = "EVENTS_LOST"


class NativePanic(Exception):
    """A panic of a native library, which PyO3 raises as a BaseException that ends the process."""


def as_exception(error: BaseException) -> Exception:
    """Return an Exception as it is, and a panic of a native library as NativePanic.

    Raises `error` if it stops the thread, the task or the process on purpose.
    """
    if isinstance(error, Exception):
        return error
    from asyncio import CancelledError  # noqa: PLC0415  # slow to import, and rarely needed

    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | CancelledError):
        raise error
    return NativePanic(f"{type(error).__name__}: {error}")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise NativePanic for a panic of a native library."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        raise as_exception(error) from error


class Internal(WorkerError):
    """A bug in the worker. The message names its kind; the traceback is only logged."""

    retriable = True
