"""Bytes and operations that a token or a prompt requires on one backend.

Each weight is read once, the keys and values that a token attends to once. Of a mixture only the
selected experts count; of an embedding that is not also the output head, only the tokens' rows.
Activations and logits are excluded: they fit the caches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from worker.backend import Plan
from worker.gguf_file import TensorInfo
from worker.model import cached


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and operations of one model; `weight_bytes` is a tensor's size on the backend."""

    planned: Plan
    weight_bytes: Callable[[TensorInfo], int]

    def token_bytes(self, context: int) -> int:
        """Bytes of a decode step that attends to `context` keys, fewer in a layer with a window."""
        return self._weights(1) + self._key_bytes(context)

    def step_bytes(self, sequences: int, context: int) -> int:
        """Bytes of a decode step of several sequences, each of which attends to `context` keys.

        Of a mixture all experts that uniform routing is expected to choose.
        """
        return self._step_weights(sequences) + sequences * self._key_bytes(context)

    def step_floor_s(
        self, sequences: int, context: int, bytes_per_s: float, operations_per_s: float = math.inf
    ) -> float:
        """Seconds of a decode step at the device's rates; arguments as for `step_bytes`.

        The weights are read while the products are computed, the keys and values are read after.
        """
        weights = self._step_weights(sequences) / bytes_per_s
        products = self.planned.product_flops(sequences, sequences) / operations_per_s
        return max(weights, products) + sequences * self._key_bytes(context) / bytes_per_s

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes of a prompt: the weights once, however it is chunked, and its keys and values."""
        return self._weights(tokens) + tokens * self.planned.kv_bytes_per_token

    def prompt_floor_s(self, tokens: int, bytes_per_s: float, operations_per_s: float = math.inf) -> float:
        """Seconds of a prompt at the device's rates: reading, or the operations if longer."""
        operations = self.prompt_flops(tokens) + self._attention_flops(tokens)
        return max(self.prompt_bytes(tokens) / bytes_per_s, operations / operations_per_s)

    def prompt_flops(self, tokens: int) -> int:
        """Multiplications and additions of a prompt's products; the head runs for one token."""
        return self.planned.product_flops(tokens, 1)

    def _attention_flops(self, tokens: int) -> int:
        """Multiplications and additions of attention to the keys in each layer's window."""
        operations = 0
        for spec in self.planned.attention:
            most = min(tokens, spec.window or tokens)
            operations += 4 * spec.q_width * (most * (most + 1) // 2 + (tokens - most) * most)
        return operations

    def _key_bytes(self, context: int) -> int:
        """Bytes of the keys and values that a token attends to, fewer in a layer with a window."""
        specs = self.planned.attention
        elements = sum(min(context, spec.window or context) * spec.kv_width for spec in specs)
        return elements * self.planned.kv_bytes_per_token // sum(spec.kv_width for spec in cached(specs))

    def _step_weights(self, sequences: int) -> int:
        hp, total = self.planned.hparams, self._weights(sequences)
        if not hp.expert_count:
            return total
        at_most = min(sequences * hp.expert_used_count, hp.expert_count)
        expected = hp.expert_count * (1 - (1 - hp.expert_used_count / hp.expert_count) ** sequences)
        experts = sum(self.weight_bytes(info) for info in self.planned.weights if "_exps." in info.name)
        return total - int(experts * (at_most - expected) / hp.expert_count)

    def _weights(self, tokens: int) -> int:
        """Bytes of the weights that `tokens` tokens use, with the most experts they can use."""
        hp, untied, total = self.planned.hparams, self.planned.untied, 0
        for info in self.planned.weights:
            nbytes = self.weight_bytes(info)
            if info.is_table or (untied and info.name == "token_embd.weight"):
                total += min(tokens, info.shape[0]) * nbytes // info.shape[0]
            elif "_exps." in info.name:
                total += min(tokens * hp.expert_used_count, hp.expert_count) * nbytes // hp.expert_count
            else:
                total += nbytes
        return total
