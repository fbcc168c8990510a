"""To add a kernel is one file and one line: one that no other file knows is chosen, costed, planned and run."""

import dataclasses

import pytest
import torch
from fake_kernel import FAKE, FakeProduct
from pipeline_cases import GROUP_SIZE, QUANT, Draw
from test_identity import run_and_check

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.config import compose_settings, to_object
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.registry import KERNELS, list_candidates, select_kernel
from ds_llmpq.quant.layers import LayerLoader
from ds_llmpq.quant.packing import Groups
from ds_llmpq.serving.config import PlanConfig
from ds_llmpq.serving.planning import make_plan

CORE = DeviceType("core", "cpu", 0, 1e10, {"float32": 1e11}, 0.0, (1, 2, 3, 4, 8, 16), None, "measured: here")


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(KERNELS, FAKE.name, FAKE)


def test_it_is_chosen_where_it_can_run(known, monkeypatch):
    monkeypatch.setattr(type(KERNELS["openvino_graph"]), "is_usable", lambda self, dtype: False)
    assert select_kernel(QuantConfig([4]), ["cpu"], "float32").kernel == "fake"
    assert select_kernel(QuantConfig([4]), ["cuda"], "float32").kernel == "dequantize"
    assert select_kernel(QuantConfig([4], group_size=128), ["cpu"], "float32").kernel == "dequantize"
    assert list_candidates("cpu", "float32", QuantConfig([4])) == [FAKE, DEQUANTIZE]


def test_it_is_costed_by_what_it_says(known, checkpoint_of):
    path = checkpoint_of("llama")
    shape, groups = read_shape(path), Groups(GROUP_SIZE)
    memory = MemoryModel(shape, groups, 4, FAKE)
    assert memory.layer_bytes(4) == memory.layer_bytes(8)
    assert memory.layer_bytes(3) == MemoryModel(shape, groups, 4).layer_bytes(3)
    assert memory.kv_bytes_per_sequence_layer(1) == memory.kv_bytes_per_sequence_layer(8)
    assert memory.workspace_parts(1, 1, 0, quantized=True)["dequantized"] > 1000  # 3 bits run through dequantize
    ours, theirs = (RooflineCosts(CORE, shape, "float32", groups, kernel) for kernel in (FAKE, DEQUANTIZE))
    assert ours.decode_seconds(4, 1, 8) < 0.5 * theirs.decode_seconds(4, 1, 8)
    assert ours.decode_seconds(3, 1, 8) == theirs.decode_seconds(3, 1, 8)
    quant = QuantConfig([4], GROUP_SIZE, 1, False, "fake")
    layer = LayerLoader(Checkpoint(path), [4] * 5, quant, torch.float32, torch.device("cpu")).decoder_layer(0)
    assert count_stored_bytes(layer) == memory.layer_bytes(4)
    assert FakeProduct.built > 0


def test_it_is_planned(known, checkpoint_of, tmp_path):
    line = ["cluster=local_cpu2", f"model.path={checkpoint_of('llama')}", "quant.kernel=fake", "quant.bits=[4]",
            "quant.group_size=32", "engine.dtype=float32", "workload.sequences=4", "workload.prompt_tokens=8",
            "workload.generated_tokens=8"]  # fmt: skip
    plan = make_plan(to_object(compose_settings("plan", line), PlanConfig), tmp_path)
    assert {stage.kernel for stage in plan.stages} == {plan.quant.kernel} == {"fake"}
    assert "kernel fake" in str(plan.provenance)


@pytest.mark.parametrize("stages", [1, 2])
def test_it_runs_in_the_engine(ranks, checkpoint_of, stages):
    """Its tokens are those of HQQ's own layers: 3 bits and 16 run beside it."""
    draw = Draw(seed=40 + stages)
    case, expected = draw.case(checkpoint_of("llama"), stages, (4, 8, 3, 16, 4))
    quant = dataclasses.replace(case.plan.quant, kernel="fake", bits=(3, 4, 8, 16), group_size=QUANT["group_size"])
    parts = tuple(dataclasses.replace(stage, kernel="fake") for stage in case.plan.stages)
    case = dataclasses.replace(case, plan=dataclasses.replace(case.plan, quant=quant, stages=parts))
    run_and_check(ranks, [(case, expected)])
