"""Which kernel a profile settles on, from times that are made up, and that real ones can be taken."""

import pytest
import torch

from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.profiling import kernel_choice
from ds_llmpq.profiling.kernel_choice import KernelTime, choose_kernel
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.profiling.timer import Timer
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.registry import KERNELS
from ds_llmpq.report.fidelity import format_kernels

SIZES_OF_MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
SHAPE = ModelShape.from_config(SIZES_OF_MODEL)


class Other(Kernel):
    name, source, library = "other", "made up", "torch"


OTHER = Other()
SIZES = {"prefill": [1, 2, 4], "decode": [2, 4, 8]}
TIMER = Timer(torch.device("cpu"))


def chosen(workload, bits=(4, 16), dtype="bfloat16", lm_head_bits=16):
    quant = QuantConfig(list(bits), lm_head_bits=lm_head_bits)
    return choose_kernel(TimingTask("", SHAPE, workload, quant, dtype, bits, SIZES), TIMER)


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by kernel: [1 row, a decode micro-batch, a prefill micro-batch]."""

    def given(**milliseconds):
        monkeypatch.setattr(
            kernel_choice,
            "list_candidates",
            lambda *_: [(KERNELS | {OTHER.name: OTHER})[name] for name in milliseconds],
        )
        monkeypatch.setattr(
            kernel_choice,
            "_times",
            lambda shape, quant, widths, dtype, timer, rows, kernel: [
                KernelTime(kernel.name, bits, count, cost / 1e3)
                for bits in widths
                for count, cost in zip(rows, milliseconds[kernel.name], strict=True)
            ],
        )

    return given


def test_the_workload_s_phases_decide(times):
    times(other=[1, 2, 90], dequantize=[8, 9, 10])
    long_answers = chosen(WorkloadConfig(8, 20, 200))
    assert long_answers.kernel is OTHER
    assert long_answers.crossover(4) == 40  # rows of a prefill micro-batch: 2 sequences of 20 tokens
    assert chosen(WorkloadConfig(8, 20, 2)).kernel is KERNELS["dequantize"]
    assert chosen(WorkloadConfig(8, 20, 2)).crossover(4) is None


def test_a_graph_is_taken_where_its_products_win(times):
    times(openvino_graph=[], openvino=[1, 2, 3], other=[2, 3, 4], dequantize=[8, 9, 1])
    choice = chosen(WorkloadConfig(8, 20, 200))
    assert choice.kernel is KERNELS["openvino_graph"]
    assert {time.kernel for time in choice.times} == {"openvino", "other", "dequantize"}
    assert choice.crossover(4) == 40
    assert chosen(WorkloadConfig(8, 20, 200), bits=(16,)).kernel is KERNELS["openvino_graph"]
    times(openvino_graph=[], openvino=[2, 3, 4], other=[1, 2, 3], dequantize=[8, 9, 10])
    assert chosen(WorkloadConfig(8, 20, 200)).kernel is OTHER


def test_an_lm_head_below_16_bits_is_reason_enough_to_choose(times):
    times(openvino=[1, 2, 3], dequantize=[8, 9, 10])
    assert chosen(WorkloadConfig(8, 20, 200), bits=(16,)).kernel is KERNELS["dequantize"]
    low = chosen(WorkloadConfig(8, 20, 200), bits=(16,), lm_head_bits=8)
    assert low.kernel is KERNELS["openvino"]
    assert {time.bits for time in low.times} == {8}


def test_the_note_names_the_library_s_version_and_all_times(times):
    times(other=[1, 2, 3], dequantize=[8, 9, 10])
    note = chosen(WorkloadConfig(8, 20, 200)).note()
    assert note["kernel"] == f"other (torch {OTHER.version})"
    assert len(note["kernel_times"]) == 6
    assert note["dequantize_faster_from_rows"] == {"4": None}
    assert "dequantize 4 bits" in format_kernels(note)


def test_nothing_is_timed_where_there_is_nothing_to_choose():
    assert chosen(WorkloadConfig(8, 20, 200), bits=(16,)).times == ()
    assert chosen(WorkloadConfig(8, 20, 200), dtype="float32").kernel is KERNELS["dequantize"]


@pytest.mark.skipif(KERNELS["openvino"].version is None, reason="needs OpenVINO")
def test_real_times(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_SHARE_SECONDS", 0.0)
    # large enough for OpenVINO to save memory
    shape = ModelShape.from_config(SIZES_OF_MODEL | {"hidden_size": 768, "intermediate_size": 1536})
    widths = (4, 8, 16)
    task = TimingTask("", shape, WorkloadConfig(8, 4, 200), QuantConfig(list(widths)), "bfloat16", widths, SIZES)
    choice = choose_kernel(task, TIMER)
    assert {(time.kernel, time.bits) for time in choice.times} >= {("openvino", 4), ("dequantize", 8)}
    assert all(time.seconds > 0 for time in choice.times)
    assert choice.kernel in KERNELS.values()


@pytest.mark.parametrize(("gains", "zeros"), [(True, "whole"), (False, "real")])
def test_a_kernel_is_timed_with_the_zeros_that_it_would_run(gains, zeros, monkeypatch):
    monkeypatch.setattr(Other, "whole_zeros", gains)
    seen = []
    monkeypatch.setattr(kernel_choice, "quantize_linear", lambda *given: seen.append(given[3].zeros))
    monkeypatch.setattr(
        kernel_choice, "build_linears", lambda kernel, linears, *how: [torch.nn.Identity() for _ in linears]
    )
    kernel_choice._modules(SHAPE, QuantConfig([4]), 4, "float32", torch.device("cpu"), OTHER)
    assert set(seen) == {zeros}
    seen.clear()
    kernel_choice._modules(SHAPE, QuantConfig([4], zeros="real"), 4, "float32", torch.device("cpu"), OTHER)
    assert set(seen) == {"real"}
