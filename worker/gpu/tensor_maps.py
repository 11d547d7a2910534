"""Tensor maps: matrices of f16 that kernels of sm_90 copy in boxes (`kernels/bulk_copy.cuh`)."""

from typing import Any

import numpy as np

from worker.gpu.layouts import address
from worker.gpu.memory import DeviceArray

_TENSOR_MAP = np.dtype([("opaque", "u8", 16)])
"""`TensorMap` of bulk_copy.cuh."""


def tensor_map(x: DeviceArray | None, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """A kernel parameter `TensorMap` of the rows of x [..., cols] f16: boxes of `rows` × `columns`.

    Columns of a box are 64 or 32. Its rows are swizzled, and elements beyond x are zeros. In a dry
    run, with x None or without memory, the map is zeros.
    """
    if x is None or not address(x):
        return np.zeros((), _TENSOR_MAP)
    from cuda.bindings import driver  # noqa: PLC0415

    swizzles, cols = driver.CUtensorMapSwizzle, x.shape[-1]
    status, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        address(x),
        [driver.cuuint64_t(cols), driver.cuuint64_t(x.size // cols)],
        [driver.cuuint64_t(2 * cols)],
        [driver.cuuint32_t(columns), driver.cuuint32_t(rows)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        {64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B, 32: swizzles.CU_TENSOR_MAP_SWIZZLE_64B}[columns],
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return np.array(([int(word) for word in encoded.opaque],), _TENSOR_MAP)
