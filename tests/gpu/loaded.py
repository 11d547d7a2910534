"""Tiny models on the GPU, and beside each the twin that rounds where the GPU rounds."""

from __future__ import annotations

from tests.models import cpu_runner
from tests.quantized_ops import QuantizedOps
from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.cpu.threads import Threads
from worker.engine.kv_blocks import blocks_for
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import Phase


def gpu_runner(path, kernels, memory, *, context=512, sliding_window="auto", padding_ids=(), end_ids=(), **settings):
    """The model of a file on the GPU, with a KV pool of one context; any row's logits may be wanted."""
    from worker.gpu.layouts import weight_bytes
    from worker.gpu.memory import Pool, Purpose
    from worker.gpu.runner import GpuRunner, GpuSettings
    from worker.gpu.upload import Upload

    with GgufFile.open(path) as file:
        hp = read_hparams(file)
        claimed = bind(file, ModelOptions(context, sliding_window))[1].claimed()
        pool = Pool(memory, sum(map(weight_bytes, claimed)), Purpose.WEIGHTS)
        upload = Upload(file, kernels, memory, pool)
        model, _ = bind(file, ModelOptions(context, sliding_window), upload)
        upload.close()
    defaults = {"kv_blocks": blocks_for(context), "context": context, "prefill_tokens": 512, "logit_rows": 512}
    chosen = GpuSettings(**{**defaults, **settings})
    return GpuRunner(model, hp, memory, kernels, chosen, padding_ids=padding_ids, end_ids=end_ids)


def copy_cache(runner, twin):
    """Copy the keys and values of a GPU's runner to a twin."""
    for layer, own in enumerate(zip(twin.cache.k, twin.cache.v, strict=True)):
        for rows, theirs in zip(own, runner.cache.layer(layer), strict=True):
            rows[:] = theirs.get().swapaxes(1, 2)


def rounding_twin(path, **options):
    """The CPU's runner with an f16 cache whose products see their inputs as the GPU's do."""
    runner = cpu_runner(path, kv_type="f16", **options)
    runner._ops = {phase: QuantizedOps(runner.cache, phase, Threads()) for phase in Phase}
    return runner
