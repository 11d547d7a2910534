"""Run a selection of the GPU tests in the emulator on machines without a GPU, one process a file.

`CHOSEN` covers the kernels of both phases in about a minute on two cores, compilation included. For
what an emulated run can and cannot show see `tests/gpu/emulator`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu.emulator.compiler import why_no_compiler
from tests.gpu.suite import REPOSITORY, why_no_gpu

CHOSEN = {
    "attention": "(prefill_equals and -77] and 96 and 40) or clamped or scaled or (decode_split and 20)"
    " or (prefill_equals and -77] and 512) or (8_bits and 512) or (reads_only and 256)"
    " or (of_a_batch and 96 and ((wgmma and f16) or (mma_sync and q8)))"
    " or (unwritten and 250-450 and (96 or 700))",
    "attention_rows": "listed or windows",
    "q8_cache": "norms or (single_rows and 96 and 40) or nan",
    "scaled_f16": "",
    "glu_bounds": "(greatest and (Q4_K or IQ3_S or F16)) or of_a_model or scales"
    " or (extreme and (Q4_K or mixed) and 160)",
    "layouts": "(random_bytes and 7-256 and (Q4_K or Q6_K or Q5_1 or MXFP4 or IQ or TQ or NVFP4)) or vectors"
    " or (embedded and 0.1 and (Q4_K or Q6_K or BF16))",
    "memory": "",
    "matvec": "37-256 and (Q4_K or Q8_0 or MXFP4 or F16 or IQ4_XS) or residual or gelu",
    "matvec_mma": "(no_tile and Q4_K and 40) or (gated and 160 and Q6_K) or (hold and 21) or gelu",
    "matmul": "37-256 and (Q4_K or Q8_0 or MXFP4 or F16 or IQ4_XS) or gelu",
    "matmul_wgmma": "(every_tile and (Q4_K or Q6_K or F16 or gelu)) or two_types or chosen",
    "rope_projections": "Q5_0 or Q4_K or others",
    "norms": "",
    "softcap": "",
    "layer_inputs": "",
    "experts": "(decode_experts and MXFP4 and 3-5-3) or (ones_get_zeros and 23552) or (own_norm and 7-Q4_K) or gelu"
    " or (prefill_experts and MXFP4 and 300) or alone_and_together or route_chooses",
    "routing": "",
    "runner": "(prefill_logits and qwen2]) or both_phases or (largest_tiles and phi3)",
    "slots": "padded or aborted or dropped or not_finite or ends_on or (may_grow and 3) or uploads",
    "drafts": "accepted_and or finite or (one_after and 17 and 96)",
    "sampler": "(draws or 8-320) and 320 or advances or forced or not_finite or stop_tokens or almost or its_mask",
    "gpu_products": "",
    "grammars": "(fault_of and 1) or fault_at or multiple or second_draw or end_token or log_prob or not_finite",
}
"""Files, and the expression for `pytest -k`; an empty one selects all tests."""


@pytest.mark.parametrize("file", CHOSEN)
def test_kernels_emulated_on_the_cpu_pass_the_tests_of_the_gpu(file):
    if why_no_gpu() is None:
        pytest.skip("a GPU is here, and runs these tests itself")
    if reason := why_no_compiler():
        pytest.skip(reason)
    emulated = [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.emulator.plugin", "-k", CHOSEN[file]]
    command = [*emulated, f"tests/gpu/test_{file}.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    result = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in result, done.stdout
