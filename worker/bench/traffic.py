"""The bytes that no kernel can avoid: what a token and a prompt have to move on one backend. Pure arithmetic.

Each weight is read once, of a mixture only the experts in use, of an embedding that is not also the output head only
the rows of the tokens; and the keys and values that a token attends to. Activations and logits are left out: they fit
the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from worker.backend import Plan
from worker.gguf_file import TensorInfo


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and arithmetic of one model on one backend, whose sizes `weight_bytes` tells."""

    planned: Plan
    weight_bytes: Callable[[TensorInfo], int]

    def token_bytes(self, seen: int) -> int:
        """What the decode step moves whose token attends to `seen` keys, itself among them, where nothing cuts them.

        A layer with a window sees the window's newest keys.
        """
        keys = sum(min(seen, window or seen) for window in self.planned.windows)
        return self._weights(1) + keys * self._kv_a_layer

    def prompt_bytes(self, tokens: int) -> int:
        """What a prompt moves: weights once, however it is cut, and its keys and values written once."""
        return self._weights(tokens) + tokens * self.planned.kv_bytes_per_token

    def prompt_flops(self, tokens: int) -> int:
        """Multiplications and additions of a prompt's products with weights; the head's for its last token alone."""
        hp, head = self.planned.hparams, "output.weight" if self._untied else "token_embd.weight"
        total = 0
        for info in self.planned.weights:
            if len(info.shape) < 2 or info.name.endswith(".bias") or info.name == "token_embd.weight" != head:
                continue
            elements = math.prod(info.shape)
            if _of_experts(info):
                elements = elements * hp.expert_used_count // hp.expert_count
            total += 2 * elements * (1 if info.name == head else tokens)
        return total

    @property
    def _untied(self) -> bool:
        return any(info.name == "output.weight" for info in self.planned.weights)

    @property
    def _kv_a_layer(self) -> int:
        return self.planned.kv_bytes_per_token // self.planned.hparams.block_count

    def _weights(self, tokens: int) -> int:
        """Bytes of the weights that `tokens` tokens meet, each once; the most experts that they can choose."""
        hp, untied, total = self.planned.hparams, self._untied, 0
        for info in self.planned.weights:
            nbytes = self.weight_bytes(info)
            if untied and info.name == "token_embd.weight":
                total += min(tokens, info.shape[0]) * nbytes // info.shape[0]
            elif _of_experts(info):
                total += min(tokens * hp.expert_used_count, hp.expert_count) * nbytes // hp.expert_count
            else:
                total += nbytes
        return total


def _of_experts(info: TensorInfo) -> bool:
    return "_exps." in info.name
