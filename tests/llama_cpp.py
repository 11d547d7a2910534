"""llama.cpp as a second engine on the CPU, through the `xllamacpp` wheel: log-probabilities, greedy ids, token ids.

It opens no port (its HTTP side listens on a socket file), prints nothing, and is released at the end of the block. It
needs a whole model: a vocabulary-only file fails to load. What its server does otherwise than one thinks:

- `n_probs` are log-softmaxes of the raw logits over all rows, before bias and sampling. But a token that ends inside a
  UTF-8 character is left out of the list, so long answers in Russian or Japanese lose steps. So each step here asks for
  one token, with a bias that forces an ASCII one: only the list is read, its first entry is the greedy choice.
- Activations are quantized to 8 bits in every product with a quantized matrix: SmolLM2's Q4_1 file is 0.08 nat (median
  of the top 20) off the exact log-probabilities. `write_f32_copy` avoids it. So do f32 KV and no flash attention, whose
  products are f16: without those two a copy is 0.002 nat off, with them 0.0001.
- YaRN's bounds are rounded and its betas are 32 and 1 whatever the file says: no reference for gpt-oss.
- `/apply-template` leaves out a BOS that `/tokenize` with `add_special` writes.
- Several threads spin at barriers: on cores shared with another busy process two are ten times slower than one.
"""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
from xllamacpp import xllamacpp

Ranked = list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """One generated token and the best log-probabilities (id, nat) that it was chosen from, best first."""

    token: int
    top: Ranked


class LlamaCpp:
    """One model in llama.cpp, while its `with` block lasts; RuntimeError if llama.cpp won't have the file."""

    def __init__(self, model: Path, *, context: int = 2048, threads: int = 1) -> None:
        self._parameters = _parameters(model, context, threads)
        self._open = ExitStack()
        self._server: Any = None
        self._socket = ""
        self._ascii = 0

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            # A host whose name ends in .sock is a Unix socket to llama.cpp.
            self._socket = f"{opening.enter_context(tempfile.TemporaryDirectory())}/http.sock"
            self._parameters.hostnames = [self._socket]
            self._server = xllamacpp.Server(self._parameters)
            opening.callback(setattr, self, "_server", None)  # its destructor stops the threads and frees the model
            self._ascii = self.tokenize("a")[-1]
            self.next_logprobs([self._ascii], 1)  # a server that is closed before its main loop runs never ends
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def next_logprobs(self, ids: Sequence[int], count: int = 20) -> Ranked:
        """The `count` best continuations of `ids` (id, log-probability in nat), best first."""
        reply = self._complete(prompt=list(ids), n_predict=1, n_probs=count, logit_bias=[[self._ascii, 1000.0]])
        (step,) = reply["choices"][0]["logprobs"]["content"]
        return [(entry["id"], entry["logprob"]) for entry in step["top_logprobs"]]

    def greedy(self, ids: Sequence[int], max_tokens: int, *, ends: Collection[int] = (), count: int = 20) -> list[Step]:
        """The greedy continuation of `ids`, up to an id in `ends` (included) or `max_tokens`."""
        steps: list[Step] = []
        while len(steps) < max_tokens and not (steps and steps[-1].token in ends):
            top = self.next_logprobs([*ids, *(step.token for step in steps)], count)
            steps.append(Step(top[0][0], top))
        return steps

    def complete(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation of `ids` as llama.cpp samples it: without suppressed tokens, up to an end token."""
        prompt = {"prompt": list(ids), "n_predict": max_tokens, "return_tokens": True}
        reply = self._post("/completion", {"temperature": 0.0, "samplers": ["temperature"], **prompt})
        return [int(token) for token in reply["tokens"]]

    def ends_at(self, token: int) -> bool:
        """Whether a generation ends when it draws `token`."""
        biased = {"prompt": [self._ascii], "n_predict": 2, "logit_bias": [[token, 1000.0]]}
        reply = self._post("/completion", {"temperature": 0.0, "samplers": ["temperature"], **biased})
        return bool(reply["stop_type"] == "eos")

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`; `bos` adds what the vocabulary begins with, `special` parses control tokens."""
        reply = self._post("/tokenize", {"content": text, "add_special": bos, "parse_special": special})
        return [int(token) for token in reply["tokens"]]

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template's prompt for `messages`, without BOS: tokenize it with `bos` and `special`."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def decode_speed(self, tokens: int = 64) -> float:
        """Tokens a second when it decodes one sequence, after a few to warm up."""
        self._complete(prompt=[self._ascii] * 16, n_predict=8, ignore_eos=True)
        timings = self._complete(prompt=[self._ascii] * 16, n_predict=tokens, ignore_eos=True)["timings"]
        return float(timings["predicted_per_second"])

    def _complete(self, **request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._server.handle_completions(
            {"temperature": 0.0, "samplers": ["temperature"], **request}
        )
        if "choices" not in reply:
            raise RuntimeError(f"llama.cpp refused the request: {reply}")
        return reply

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(self.post_text(path, body))
        return reply

    def post_text(self, path: str, body: dict[str, Any]) -> str:
        """The body of its answer to a request: JSON, or server-sent events."""
        connection = _SocketFileConnection(self._socket)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            reply = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp refused {path}: {reply}")
        return reply


class _SocketFileConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _parameters(model: Path, context: int, threads: int) -> Any:
    """Exact and quiet: one slot, f32 attention, no warm-up, a prompt cached only as a prefix of the next one."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_threads_http = 1
    parameters.n_ctx = context
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_ram_mib = 0
    parameters.fit_params = parameters.warmup = parameters.ui = False
    parameters.verbosity = -1
    return parameters


def write_f32_copy(source: Path, target: Path) -> Path:
    """Write the model in `source` with every tensor de-quantized to F32, which llama.cpp multiplies exactly."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
