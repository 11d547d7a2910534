"""The launcher of the sampler: draw one token per row of logits in device memory, without the host.

It keeps what a draw depends on besides its request: padding and end masks, token counts, biases.
Twin: `worker/cpu/sampler.py`. Kernel: `sample.cu`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from worker.errors import Internal
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.gpu.state import REQUEST, PinnedRing, StepState, penalized
from worker.sampling import Draw, DrawRequest

_TOP = 20
_THREADS = 256
_SLICES = 128  # of the vocabulary, in sums of log-probabilities; also the most blocks of a launch
_PADDING, _END = 1, 2

DRAWN = np.dtype(
    [("id", "i4"), ("count", "i4"), ("logprob", "f8"), ("top_logprobs", "f8", _TOP), ("top_ids", "i4", _TOP)]
)
"""`Drawn` of sampling.cuh."""
_BEST = np.dtype([("score", "f8"), ("raw", "f8"), ("id", "i4"), ("broken", "i4")])
_BLOCK_RESULT = np.dtype([("best", _BEST), ("mass", "u8"), ("kept", "u8"), ("ties", "u8")])
_SCRATCH = np.dtype(
    [
        *(("barrier", "u4", 2), ("id", "i4"), ("listed", "i4"), ("list", "i4", _TOP)),
        *(("blocks", _BLOCK_RESULT, _SLICES), ("slice_sums", "f8", _SLICES)),
        ("histograms", [("count", "u8"), ("mass", "u8")], (3, 8, _THREADS)),
    ]
)
"""`GridScratch` of sampling.cuh."""

DEFINES: Mapping[str, int] = {
    "THREADS": _THREADS,
    "TOP": _TOP,
    "LOGPROB_SLICES": _SLICES,
    "REQUEST_BYTES": REQUEST.itemsize,
    "DRAWN_BYTES": DRAWN.itemsize,
    "SCRATCH_BYTES": _SCRATCH.itemsize,
}
FIXED_ORDERS: Mapping[str, str] = {
    "logprob_slices": f"sums over {_SLICES} slices of the vocabulary, {_THREADS} threads each, slices in order"
}
"""The orders of sums that `worker.gpu.numerics` reports."""

INSTANTIATIONS: tuple[KernelName, ...] = (("sample.cu", "sample"),)


class SamplerLauncher:
    """Draws for one vocabulary and at most `sequences` sequences.

    `processors` is the device's number of multiprocessors: the blocks of a launch must all be
    resident. It changes no bit of a result.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        vocab_size: int,
        padding_ids: Iterable[int],
        end_ids: Iterable[int],
        *,
        sequences: int,
        processors: int,
    ) -> None:
        def array(shape: tuple[int, ...], dtype: Any) -> DeviceArray:
            return memory.reserve(int(np.prod(shape)) * np.dtype(dtype).itemsize, Purpose.WORKSPACE).array(shape, dtype)

        self._vocabulary_mask = np.zeros(vocab_size, np.uint8)
        self._vocabulary_mask[[i for i in padding_ids if i < vocab_size]] |= _PADDING
        self._vocabulary_mask[[i for i in end_ids if i < vocab_size]] |= _END
        self._mask = array((sequences, vocab_size), np.uint8)
        self._mask.set(np.tile(self._vocabulary_mask, (sequences, 1)))
        self._masked_stops: list[frozenset[int]] = [frozenset()] * sequences
        """The stop tokens in each row of `_mask`, beside those of the vocabulary."""
        self._counts = array((sequences, vocab_size), np.int32)
        self._bias = array((sequences, vocab_size), np.float64)
        self._scores = array((vocab_size,), np.float64)
        self._weights = array((vocab_size,), np.uint64)
        self._scratch = array((_SCRATCH.itemsize,), np.uint8)
        self._scratch.fill(0)
        self.drawn = array((sequences, DRAWN.itemsize), np.uint8)
        self.drawn.fill(0)
        self._ring = PinnedRing(vocab_size * 8, slots=1)
        self._blocks = min(_SLICES, processors)
        self._vocab_size = vocab_size

    def load(self, row: int, request: DrawRequest, stream: Any) -> None:
        """Upload the mask, counts and biases of a sequence, if its draws depend on them."""
        sampling = request.sampling
        if request.forced is not None:
            return
        stops = sampling.stop_token_ids if request.index < sampling.min_tokens else frozenset[int]()
        if stops != self._masked_stops[row]:
            mask = self._vocabulary_mask.copy()
            mask[list(stops)] |= _END
            self._ring.upload([(0, mask)], self._mask[row], stream)
            self._masked_stops[row] = stops
        if penalized(sampling):
            seen = [*request.prompt, *request.generated] if sampling.penalize_prompt else request.generated
            counts = np.bincount(np.asarray(seen, np.int64), minlength=self._vocab_size).astype(np.int32)
            self._ring.upload([(0, counts)], self._counts[row], stream)
        if sampling.logit_bias:
            bias = np.zeros(self._vocab_size)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            self._ring.upload([(0, bias)], self._bias[row], stream)

    def launch(self, kernels: Launcher, logits: DeviceArray, state: StepState) -> None:
        """Draw from each row of logits [S, V] f32, into `drawn` and the state's next step."""
        kernel = kernels.get("sample.cu", "sample")
        for row in range(len(logits)):
            kernel(
                (self._blocks,),
                (_THREADS,),
                (
                    *(logits[row], self._mask[row], self._counts[row], self._bias[row], np.int32(self._vocab_size)),
                    *(state.tokens[row:], state.positions[row:], state.requests[row], self.drawn[row]),
                    *(self._scores, self._weights, self._scratch),
                ),
                pdl=True,
            )


def unpack(raw: np.ndarray[Any, Any], request: DrawRequest) -> Draw:
    """The draw in a row of `drawn` [bytes].

    Raises: Internal if the logits were not finite.
    """
    drawn = raw.view(DRAWN)[0]
    token = int(drawn["id"])
    if token < 0:
        raise Internal("the model's logits are not finite, so no token can be drawn")
    if request.sampling.logprobs is None:
        return Draw(token)
    count = int(drawn["count"])
    top = zip(drawn["top_ids"][:count].tolist(), drawn["top_logprobs"][:count].tolist(), strict=True)
    return Draw(token, float(drawn["logprob"]), tuple(top))
