"""Run one target with atheris: `python -m tests.fuzz.engine TARGET CORPUS [libFuzzer's options]`.

New inputs with new coverage are added to the folder CORPUS.
"""

import sys

import atheris

NAME = sys.argv[1]
PACKAGES = {
    "job_decoding": ["worker.jobs", "worker.text", "worker.answer", "worker.errors"],
    "gguf_opening": ["worker.gguf_file", "worker.gguf_header", "worker.adapters", "worker.text", "worker.runtime"],
    "chat_templates": ["worker.text"],
    "tokenizers": ["worker.text"],
    "gateway_requests": ["worker.gateway", "worker.jobs"],
    "gateway_app": ["worker.gateway", "worker.jobs.protocol", "starlette", "python_multipart"],
}
"""What is instrumented: more costs speed."""

with atheris.instrument_imports(include=PACKAGES[NAME]):
    from tests.fuzz.targets import run_within_limits, target

    MODULE = target(NAME)


def main() -> None:
    """Run until libFuzzer exits."""
    if hasattr(MODULE, "prepare"):
        MODULE.prepare()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: run_within_limits(MODULE, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
