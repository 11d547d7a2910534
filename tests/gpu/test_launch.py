"""A dry run determines the kernels and the activation bytes of a forward without a device."""

from __future__ import annotations

import numpy as np

from worker.gpu.launch import dry_run

MIB = 1 << 20


def test_each_kernel_is_reported_once_in_the_order_of_first_use():
    reported = []

    def forward(kernels, pool):
        for name in ("b", "a", "b"):
            kernels.get("k.cu", name)((1,), (32,), (), shared_mem=0, pdl=True)

    assert dry_run(forward, reported.append).kernels == (("k.cu", "b"), ("k.cu", "a")) == tuple(reported)


def test_an_array_s_memory_is_reused_after_its_last_view_dies():
    def forward(kernels, pool):
        views = [view(pool.empty((1024, 1024), np.uint8)) for view in (lambda a: a[3:], lambda a: a.reshape(-1, 64))]
        first = pool.empty(MIB, np.uint8)
        assert first.shape == (MIB,)
        views.pop(0)
        pool.empty((MIB,), np.uint8)  # reuses the memory of the first view's array

    assert dry_run(forward).pool_bytes == 3 * MIB


def test_arrays_have_sizes_but_no_memory():
    def forward(kernels, pool):
        array = pool.empty((1 << 20, 1 << 20), np.float32)
        assert array.nbytes == 1 << 42
        assert array.reshape(1 << 10, -1)[5:].shape == ((1 << 10) - 5, 1 << 30)

    assert dry_run(forward).pool_bytes == 1 << 42
