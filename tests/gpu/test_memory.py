"""Accounted device memory: repeatable offsets, complete release, failures without leaks."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import VramOom
from worker.gpu.memory import ALIGNMENT, DeviceMemory, FreeList, Pool, Purpose, aligned


def test_the_first_range_that_fits_is_allocated():
    free_list = FreeList(100)
    assert [free_list.allocate(30), free_list.allocate(30), free_list.allocate(30)] == [0, 30, 60]
    assert free_list.allocate(20) is None
    free_list.release(0, 30)
    free_list.release(60, 30)
    assert free_list.allocate(40) == 60
    assert free_list.allocate(30) == 0
    assert free_list.free == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 1000)), max_size=80))
def test_allocations_never_overlap_and_all_bytes_are_released(steps):
    free_list, allocated = FreeList(200), []
    for release, size, pick in steps:
        if release and allocated:
            free_list.release(*allocated.pop(pick % len(allocated)))
            continue
        offset = free_list.allocate(size)
        if offset is not None:
            assert 0 <= offset <= 200 - size
            assert all(offset + size <= at or at + length <= offset for at, length in allocated)
            allocated.append((offset, size))
        assert free_list.free == 200 - sum(length for _, length in allocated)
    for range_ in allocated:
        free_list.release(*range_)
    assert free_list.allocate(200) == 0


def test_a_slab_is_accounted_until_the_last_array_over_it_dies(memory):
    slab = memory.reserve(1000, Purpose.KV)
    assert memory.used[Purpose.KV] == aligned(1000) == 1024
    array = slab.array((10,), np.float32, offset=256)
    assert array.data.ptr == slab.address + 256
    view = array[2:]
    del slab, array
    gc.collect()
    assert memory.used[Purpose.KV] == 1024
    del view
    assert memory.used[Purpose.KV] == 0
    assert sum(memory.used.values()) == 0


def test_a_pool_gives_the_same_addresses_to_the_same_forward(memory):
    pool = Pool(memory, 1 << 16, Purpose.ACTIVATIONS)

    def forward():
        a = pool.empty((3, 100))
        b = pool.empty(7, np.int32)
        a = pool.empty((50,))[10:]
        c = pool.empty((300,), np.uint8)
        return [x.data.ptr for x in (a, b, c)]

    first = forward()
    assert pool.in_use == 0
    assert first == forward()
    assert all((at - 40) % ALIGNMENT == 0 for at in first[:1])
    assert all(at % ALIGNMENT == 0 for at in first[1:])
    assert 0 < pool.peak <= pool.nbytes


def test_a_full_pool_raises_and_works_again_after_a_release(memory):
    pool = Pool(memory, 1024, Purpose.ACTIVATIONS)
    held = pool.empty(192)
    with pytest.raises(VramOom, match="cannot allocate 512 bytes of device memory for activations: 256 are free"):
        pool.empty(100)
    del held
    assert pool.empty(256).nbytes == 1024


def test_a_failed_allocation_is_vram_oom_and_is_not_accounted(memory):
    with pytest.raises(VramOom) as refused:
        memory.reserve(1 << 50, Purpose.WEIGHTS)
    assert refused.value.details["required"] == 1 << 50
    assert memory.used[Purpose.WEIGHTS] == 0
    memory.reserve(1 << 20, Purpose.WEIGHTS)


def test_each_allocation_can_be_made_to_fail(gpu):
    for n in range(1, 5):
        memory, done = DeviceMemory(fails=lambda number, n=n: number == n), []

        def allocate(memory=memory, done=done):
            for _ in range(2):
                pool = Pool(memory, 4096, Purpose.ACTIVATIONS)
                done.append(None)
                done.append(pool.empty(10))

        with pytest.raises(VramOom):
            allocate()
        assert len(done) == n - 1
        done.clear()
        gc.collect()
        assert memory.used[Purpose.ACTIVATIONS] == 0


def test_slabs_are_plain_device_memory(memory):
    slabs = [memory.reserve(1 << 20, purpose) for purpose in Purpose]
    assert memory.non_resident() == []
    assert [memory.used[purpose] for purpose in Purpose] == [slab.nbytes for slab in slabs]
