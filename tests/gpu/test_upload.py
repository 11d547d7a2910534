"""Every byte of a file reaches its place over several lanes; a chunk that does not is an error that leaves nothing."""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.gpu.fake_cuda import FakeCupy, FakeKernels, FakeMemory, FakePool, cut
from worker.errors import CudaError
from worker.gguf_file import TensorInfo
from worker.gpu import upload as module
from worker.gpu.upload import Upload
from worker.quants import BF16, F32, MXFP4, Q4_K, Q6_K, Q8_0

CHUNK = 4096
EACH_KIND = pytest.mark.parametrize("kind", [Q8_0, MXFP4, Q4_K, Q6_K, BF16], ids=lambda kind: kind.name)


@pytest.fixture
def cupy(monkeypatch):
    """A device of the host's own memory; chunks are small, so that a tensor is many."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cuda)
    monkeypatch.setattr(module, "CHUNK", CHUNK)
    return fake


def tensor(kind, rows, cols, name="w.weight"):
    blocks = np.random.default_rng(kind.ggml_id).integers(0, 256, (rows, kind.row_bytes(cols)), np.uint8)
    return TensorInfo(name, (rows, cols), kind, 0, blocks.nbytes), blocks


def uploading(tensors, memory, heard=lambda _: None):
    data = {info.name: blocks for info, blocks in tensors}
    file = SimpleNamespace(
        data=lambda info: data[info.name],
        pieces=lambda info: np.split(data[info.name], info.shape[0] if info.stride else 1),
    )
    return Upload(file, FakeKernels(), memory, FakePool(), heard)


@EACH_KIND
def test_the_pieces_of_a_part_are_adjacent_in_every_plane(cupy, kind):
    """Items of 3 rows, as of the experts of a tensor with gate and up, against the same rows in one piece."""
    info, blocks = tensor(kind, 36, 256)
    part = replace(info, shape=(12, 3, 256), stride=2 * blocks.nbytes // 12)
    whole, pieces = (uploading([(each, blocks)], FakeMemory()) for each in (info, part))
    expected, found = whole(info).data.planes, pieces(part).data.planes
    whole.close(), pieces.close()
    for one, other in zip(expected, found, strict=True):
        assert one is other is None or np.array_equal(one.host.reshape(-1), other.host.reshape(-1))


@EACH_KIND
def test_every_chunk_of_a_matrix_reaches_its_place_in_every_plane(cupy, kind):
    memory, heard = FakeMemory(), []
    info, blocks = tensor(kind, 61, 1280)
    upload = uploading([(info, blocks)], memory, heard.append)
    planes = upload(info).data.planes
    upload.close()
    pieces = [blocks.reshape(-1), *[np.empty(0)] * 3] if kind is BF16 else cut(kind, blocks)
    for plane, piece in zip(planes, pieces, strict=True):
        assert plane is None if piece.size == 0 else np.array_equal(plane.host.reshape(-1), piece)
    assert len(heard) > 10
    assert cupy.copies == len(heard) * (2 if kind is BF16 else 1)  # what is not taken apart is moved by a copy too
    assert sum(heard) == info.nbytes
    assert memory.held == 0


def test_a_vector_longer_than_a_chunk_arrives_whole(cupy):
    values = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    info = TensorInfo("w.bias", (3, 1000), F32, 0, values.nbytes)
    heard = []
    upload = uploading([(info, values.view(np.uint8))], FakeMemory(), heard.append)
    array = upload(info).data
    upload.close()
    assert np.array_equal(array.host, values)
    assert heard == [info.nbytes]


def test_a_vector_arrives_times_its_scale(cupy):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    info = TensorInfo("output_norm.weight", (100,), F32, 0, values.nbytes)
    upload = uploading([(info, values[None].view(np.uint8))], FakeMemory())
    array = upload(info, 0.125).data
    upload.close()
    assert np.array_equal(array.host, values / 8)


def test_small_tensors_share_a_chunk_and_each_reaches_its_place(cupy):
    memory, heard = FakeMemory(), []
    tensors = [tensor(kind, rows, 256, f"{kind.name}.{rows}") for kind in (Q8_0, Q4_K, BF16) for rows in (1, 3, 2)]
    upload = uploading(tensors, memory, heard.append)
    arrays = [upload(info).data for info, _ in tensors]
    upload.close()
    for matrix, (info, blocks) in zip(arrays, tensors, strict=True):
        pieces = [blocks.reshape(-1), *[np.empty(0)] * 3] if info.kind is BF16 else cut(info.kind, blocks)
        for plane, piece in zip(matrix.planes, pieces, strict=True):
            assert plane is None if piece.size == 0 else np.array_equal(plane.host.reshape(-1), piece)
    assert len(heard) == 2
    assert sum(heard) == sum(info.nbytes for info, _ in tensors)
    assert memory.held == 0


def test_lanes_end_by_themselves_after_the_last_byte_expected(cupy, monkeypatch):
    ended = []

    def end(lane):
        ended.append(lane)

    monkeypatch.setattr(module._Lane, "end", end)
    info, blocks = tensor(Q8_0, 61, 1280)
    file = SimpleNamespace(pieces=lambda info: [blocks])
    upload = Upload(file, FakeKernels(), FakeMemory(), FakePool(), expected=2 * info.nbytes)
    upload(info)
    assert not ended
    upload(info)
    upload._threads.shutdown()
    assert ended
    upload.close()


def test_a_small_file_pins_no_more_than_it_has_chunks(cupy):
    info, blocks = tensor(Q8_0, 1, 256)
    upload = uploading([(info, blocks)], FakeMemory())
    upload(info)
    upload.close()
    assert cupy.pinned == CHUNK


def test_a_tensor_that_its_model_drops_keeps_its_memory_until_its_bytes_have_arrived(cupy):
    """Frequency divisors are claimed and then read on the host: their place must not be the next tensor's meanwhile."""
    pool, (info, blocks) = FakePool(), tensor(Q8_0, 61, 1280)
    upload = Upload(SimpleNamespace(pieces=lambda info: [blocks]), FakeKernels(), FakeMemory(), pool)
    upload(info)
    gc.collect()
    assert pool.alive == 3  # Q8_0's planes
    upload.close()
    gc.collect()
    assert pool.alive == 0


@pytest.mark.parametrize("nth", [1, 7, 20])
def test_a_copy_that_fails_is_the_load_s_error_and_nothing_is_held_or_running(cupy, nth):
    cupy.fails_at, memory = nth, FakeMemory()
    info, blocks = tensor(Q8_0, 61, 1280)
    upload = uploading([(info, blocks)], memory)
    upload(info)
    with pytest.raises(CudaError, match="cudaErrorLaunchFailure"):
        upload.close()
    assert memory.held == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("upload")]


def test_an_abandoned_upload_sends_nothing_more_and_holds_nothing(cupy, monkeypatch):
    memory, gate = FakeMemory(), threading.Event()
    copy = cupy.cuda.runtime.memcpyAsync
    monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", lambda *args: gate.wait(10) and copy(*args))
    info, blocks = tensor(Q8_0, 61, 1280)
    upload = uploading([(info, blocks)], memory)
    upload(info)
    threading.Timer(0.05, gate.set).start()
    upload.abandon()
    upload.abandon()
    assert cupy.copies <= module.MAX_LANES
    assert memory.held == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("upload")]
