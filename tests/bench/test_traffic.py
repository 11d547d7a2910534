"""`Traffic` against figures computed by hand for f32 files: 4 bytes per element."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.tiny_models import TINY, make_tiny
from worker import runtime
from worker.bench.traffic import Traffic
from worker.config import ModelSection
from worker.cpu.backend import CpuBackend
from worker.gguf_file import GgufFile

# tiny qwen2: d 384, 6 heads and 2 KV heads of 64, f 256, 2 layers, output tied to the embedding
QWEN_NORMS = 2 * 384
QWEN_ATTENTION = 384 * 384 + 2 * 128 * 384 + 384 * 384
QWEN_BIASES = 384 + 128 + 128
QWEN_FFN = 3 * 256 * 384
QWEN_LAYERS = 2 * (QWEN_NORMS + QWEN_ATTENTION + QWEN_BIASES + QWEN_FFN)
QWEN_KV_LAYER = 2 * 128 * 4  # K and V of a token, 128 wide
# tiny gpt-oss: d 192, 4 heads and 2 KV heads of 64, 8 experts of 128 (4 selected), 3 layers,
# a window of 32 on layers 0 and 2
OSS_ATTENTION = 2 * 256 * 192 + 2 * 128 * 192
OSS_SMALL = 2 * 192 + 256 + 128 + 128 + 192 + 4  # norms, biases, sinks
OSS_ROUTER = 8 * 192 + 8
OSS_EXPERT = 3 * 128 * 192
OSS_EXPERT_BIASES = 128 + 128 + 192
OSS_KV_LAYER = 2 * 128 * 4


def traffic(tmp_path, name, **section):
    backend = CpuBackend()
    with GgufFile.open(make_tiny(name, tmp_path / f"{name}.gguf", quant="F32")) as file:
        return Traffic(runtime.plan(file, ModelSection(**section), backend), backend.weight_bytes)


def oss_weights(experts):
    layer = OSS_ATTENTION + OSS_SMALL + OSS_ROUTER + experts * (OSS_EXPERT + OSS_EXPERT_BIASES)
    return 3 * layer + 192 + TINY["gpt-oss"].vocab * 192  # plus the last norm and the head


def test_a_token_of_a_dense_model_moves_each_weight_once_and_its_keys_and_values(tmp_path):
    weights = TINY["qwen2"].vocab * 384 + 384 + QWEN_LAYERS
    assert traffic(tmp_path, "qwen2").token_bytes(100) == 4 * weights + 2 * 100 * QWEN_KV_LAYER


def test_of_an_untied_embedding_one_row_is_read(tmp_path):
    untied = traffic(tmp_path, "qwen2-untied")
    file_elements = (
        2 * TINY["qwen2-untied"].vocab * 384 + 384 + QWEN_LAYERS + 2 * 2 * (64 * 384 + 64)
    )  # one more KV head
    unread = (TINY["qwen2-untied"].vocab - 1) * 384
    assert untied.token_bytes(0) == 4 * (file_elements - unread)


@pytest.mark.parametrize("context", [1, 32, 33, 100])
def test_a_token_of_a_mixture_moves_the_selected_experts_and_the_keys_within_its_windows(tmp_path, context):
    keys = context + 2 * min(context, 32)
    embedding = 192
    assert traffic(tmp_path, "gpt-oss").token_bytes(context) == 4 * (oss_weights(4) + embedding) + keys * OSS_KV_LAYER


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (2, 8), (64, 8)])
def test_a_prompt_moves_each_weight_once_and_at_most_all_experts(tmp_path, tokens, experts):
    moved = 4 * (oss_weights(experts) + tokens * 192) + tokens * 3 * OSS_KV_LAYER
    assert traffic(tmp_path, "gpt-oss").prompt_bytes(tokens) == moved


def test_prompt_flops_are_two_per_weight_and_token_and_the_heads_for_one_token(tmp_path):
    vocab = TINY["qwen2"].vocab
    assert traffic(tmp_path, "qwen2").prompt_flops(10) == 2 * (
        10 * 2 * (QWEN_ATTENTION + QWEN_FFN) + vocab * 384  # the tied embedding is the head
    )
    layer = OSS_ATTENTION + 8 * 192 + 4 * OSS_EXPERT
    assert traffic(tmp_path, "gpt-oss").prompt_flops(10) == 2 * (10 * 3 * layer + TINY["gpt-oss"].vocab * 192)


def test_phi3s_window_counts_only_if_the_settings_apply_it(tmp_path):
    without, applied = traffic(tmp_path, "phi3"), traffic(tmp_path, "phi3", sliding_window="file")
    assert without.token_bytes(50) - without.token_bytes(47) == 3 * without.planned.kv_bytes_per_token
    assert applied.token_bytes(50) == applied.token_bytes(47) == without.token_bytes(47)


def test_of_a_table_the_tokens_rows_are_read_and_no_product_has_it(tmp_path):
    """gemma4-shared: a table of 6 layers' 64 elements, with 2 of 6 layers that read others' keys and values."""
    shared, row = traffic(tmp_path, "gemma4-shared"), 6 * 64
    (table,) = (info for info in shared.planned.weights if info.is_table)
    without = replace(shared, planned=replace(shared.planned, weights=tuple(
        info for info in shared.planned.weights if info is not table
    )))  # fmt: skip
    assert shared.token_bytes(0) - without.token_bytes(0) == 4 * row
    assert shared.prompt_bytes(10) - without.prompt_bytes(10) == 10 * 4 * row
    assert shared.prompt_flops(10) == without.prompt_flops(10)
    assert shared.planned.kv_bytes_per_token == 4 * 2 * 2 * (256 + 512)
    read = 4 * 2 * 3 * (32 * 256 + 100 * 512)  # by all layers; those with a window of 32 read so many
    assert shared.token_bytes(100) - shared.token_bytes(0) == read


def test_weight_sizes_are_those_of_the_backend(tmp_path):
    halved = replace(traffic(tmp_path, "qwen2"), weight_bytes=lambda info: info.nbytes // 2)
    assert 2 * halved.token_bytes(0) == traffic(tmp_path, "qwen2").token_bytes(0)


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
def test_a_step_of_one_sequence_moves_what_its_token_does(tmp_path, name):
    one = traffic(tmp_path, name)
    assert one.step_bytes(1, 40) == one.token_bytes(40)


def test_a_step_of_several_sequences_moves_the_weights_once_and_the_keys_of_each(tmp_path):
    one = traffic(tmp_path, "qwen2")
    assert one.step_bytes(5, 40) - one.token_bytes(40) == 4 * (one.token_bytes(40) - one.token_bytes(0))


def test_a_step_of_several_sequences_moves_the_experts_that_uniform_routing_is_expected_to_choose(tmp_path):
    mixture = traffic(tmp_path, "gpt-oss")
    expected = 8 * (1 - 0.5**3)
    assert mixture.step_bytes(3, 0) == pytest.approx(4 * (oss_weights(expected) + 3 * 192), abs=4)


def test_the_floor_of_a_step_is_that_of_weights_or_products_plus_keys_and_values(tmp_path):
    one, rate = traffic(tmp_path, "qwen2"), 1e9
    weights = one.token_bytes(0)
    keys = 5 * (one.token_bytes(40) - weights)
    products = 5 * 2 * (2 * (QWEN_ATTENTION + QWEN_FFN) + TINY["qwen2"].vocab * 384)
    assert one.step_floor_s(5, 40, rate) == pytest.approx((weights + keys) / rate)
    assert one.step_floor_s(5, 40, rate, 1e15) == pytest.approx((weights + keys) / rate)
    assert one.step_floor_s(5, 40, rate, 1e6) == pytest.approx(products / 1e6 + keys / rate)


def test_the_floor_of_a_mixture_counts_the_products_of_the_selected_experts(tmp_path):
    mixture = traffic(tmp_path, "gpt-oss")
    layer = OSS_ATTENTION + 8 * 192 + 4 * OSS_EXPERT
    products = 3 * 2 * (3 * layer + TINY["gpt-oss"].vocab * 192)
    assert mixture.step_floor_s(3, 0, 1e15, 1e6) == pytest.approx(products / 1e6)
    assert mixture.step_floor_s(3, 0, 1e9) == pytest.approx(mixture.step_bytes(3, 0) / 1e9)


@pytest.mark.parametrize(("tokens", "windowed"), [(20, 210), (32, 528), (40, 528 + 8 * 32)])
def test_the_floor_of_a_prompt_is_that_of_reading_or_of_products_and_attention(tmp_path, tokens, windowed):
    mixture = traffic(tmp_path, "gpt-oss")
    keys = tokens * (tokens + 1) // 2 + 2 * windowed
    operations = mixture.prompt_flops(tokens) + 2 * 2 * 4 * 64 * keys
    assert mixture.prompt_floor_s(tokens, 1e15, 1e6) == pytest.approx(operations / 1e6)
    assert mixture.prompt_floor_s(tokens, 1e9) == pytest.approx(mixture.prompt_bytes(tokens) / 1e9)
