"""Planning problems built from plain objects: tables in place, origins kept, mistakes named."""

import dataclasses
import re
from dataclasses import replace

import pytest

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import (
    ClusterConfig,
    DeviceConfig,
    DeviceTypeConfig,
    HostConfig,
    LinkConfig,
    LinkPairConfig,
)
from ds_llmpq.cost.captured_graphs import estimate_graph_bytes
from ds_llmpq.cost.latency import PassOverhead
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.build import prepare, usable_bits
from ds_llmpq.planner.config import MicroBatchesConfig, PlannerConfig, WorkloadConfig
from ds_llmpq.planner.feasibility import memory_feasible
from ds_llmpq.planner.problem import Objective, Problem
from ds_llmpq.planner.solve import solve
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.openvino import OPENVINO_GRAPH
from ds_llmpq.quant.onednn_kernels import KEPT_BYTES
from ds_llmpq.sensitivity.table import Sensitivity

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
SHAPE = ModelShape.from_config(LLAMA)


def cluster():
    config = ClusterConfig(name="mix")
    config.device_types = {
        "gpu": DeviceTypeConfig("cuda", 1 << 30, 3e11, {"float16": 6e13, "float32": 8e12}, 1e-4, [3, 4, 16]),
        "core": DeviceTypeConfig("cpu", 1 << 28, 2e10, {"float32": 1e11}, 1e-4, source="measured: here"),
    }
    config.hosts = [
        HostConfig("a", [DeviceConfig("gpu", 0), DeviceConfig("gpu", 1, memory_bytes=1 << 29)]),
        HostConfig("b", [DeviceConfig("core", 0, threads=1), DeviceConfig("core", 1, threads=2)]),
    ]
    config.links.intra_host, config.links.inter_host = LinkConfig(1e-5, 1e10), LinkConfig(1e-4, 1e9)
    config.links.pairs = [LinkPairConfig("a:1", "b:0", 1e-3, 1e8)]
    return Cluster.from_config(config)


def make(**changes):
    arguments = {
        "cluster": cluster(),
        "shape": SHAPE,
        "workload": WorkloadConfig(6, 20, 10),
        "quant": QuantConfig(bits=[16, 4, 8]),
        "planner": PlannerConfig(theta=2.0),
    }
    return prepare(**{**arguments, **changes})


class CountedCosts:
    """Times that say what they were asked for."""

    provenance = "fitted"

    def prefill_seconds(self, bits, batch, tokens):
        return None if bits == 4 else 1e6 * bits + 1e3 * batch + tokens

    def decode_seconds(self, bits, batch, past):
        return 1e9 + 1e6 * bits + 1e3 * batch + past

    def embed_seconds(self, batch, tokens):
        return 1e3 * batch + tokens

    def head_seconds(self, batch):
        return 7.0 * batch

    def pass_overhead(self, phase, batch, tokens):
        return PassOverhead()

    def alone_share(self, phase):
        return {"prefill": 0.9, "decode": 0.8}[phase]

    def time_error(self, phase):
        return {"prefill": 0.2, "decode": 0.05}[phase]


def test_tables_hold_what_the_costs_say():
    problem = make(make_costs=lambda _: CountedCosts()).problem
    assert problem.bits == (16, 4, 8)
    assert problem.micro_batches.prefill == problem.micro_batches.decode == (1, 2, 4, 6)
    assert set(problem.device_types) == {"gpu", "core", "core_x2"}
    gpu, core = problem.device_types["gpu"], problem.device_types["core_x2"]
    assert gpu.bits == (16, 4)
    assert core.bits == (16, 4, 8)
    assert core.prefill_layer_seconds[8] == {1: 8001020, 2: 8002020, 4: 8004020, 6: 8006020}
    assert core.prefill_layer_seconds[4] == {}
    assert core.decode_layer_seconds[4][6] == 1e9 + 4006000 + 25
    assert (core.prefill_embed_seconds[2], core.decode_embed_seconds[2]) == (2020, 2001)
    assert core.prefill_head_seconds[4] == core.decode_head_seconds[4] == 28
    assert (core.prefill_error, core.decode_error) == (0.2, 0.05)
    roofline = make().problem.device_types["core"]
    assert roofline.prefill_error is roofline.decode_error is None


def test_a_shared_prefix_is_computed_and_held_once():
    plain, shared = (make(workload=WorkloadConfig(6, 20, 10, tokens)) for tokens in (None, 12))
    mixed = make(workload=WorkloadConfig(6, 20, 10, 12, 25))
    per_sequence = [built.problem.memory.kv_bytes_per_sequence_layer for built in (plain, shared, mixed)]
    # of 30 positions each: 18 of its own, and 12 once; 25 where some need as many
    assert per_sequence[1] * 6 == pytest.approx(per_sequence[0] * (6 * 18 + 12) / 30)
    assert per_sequence[2] * 6 == pytest.approx(per_sequence[0] * (6 * 25 + 12) / 30)
    assert (plain.problem.workload.prefill_tokens, shared.problem.workload.prefill_tokens) == (20, 8)
    for name in ("gpu", "core"):
        before, after = (built.problem.device_types[name] for built in (plain, shared))
        assert after.decode_layer_seconds == before.decode_layer_seconds
        for size in (1, 6):
            shorter, whole = after.prefill_layer_seconds[16][size], before.prefill_layer_seconds[16][size]
            assert shorter < whole or (name == "gpu" and shorter == whole)  # where launches take longer than the work
    core = make(make_costs=lambda _: CountedCosts(), workload=WorkloadConfig(6, 20, 10, 12)).problem
    assert core.device_types["core"].prefill_layer_seconds[8][2] == 8002008
    assert core.device_types["core"].prefill_embed_seconds[2] == 2008
    with pytest.raises(UserError, match=r"workload.unshared_tokens=-1; it must be 0 or more"):
        make(workload=WorkloadConfig(6, 20, 10, 12, -1))
    with pytest.raises(UserError, match=r"workload.drawn_share=1.5; it must be from 0 to 1"):
        make(workload=WorkloadConfig(6, 20, 10, 12, 0, drawn_share=1.5))
    with pytest.raises(UserError, match=r"workload.shared_tokens=20; it must be from 0 to 19"):
        make(workload=WorkloadConfig(6, 20, 10, 20))


def test_sequences_share_the_positions_of_a_pool():
    plain, pooled, small = (make(workload=WorkloadConfig(6, 20, 10, 12, 0, pool)) for pool in (None, 70, 1))
    bytes_of = [6 * built.problem.memory.kv_bytes_per_sequence_layer for built in (plain, pooled, small)]
    # the prefix has 12 positions, and behind it each has 18; or all share 70 in blocks of 32, of which the prefix fills
    # none, but at least what one needs
    assert bytes_of[1] == pytest.approx(bytes_of[0] * 96 / (6 * 18 + 12))
    assert bytes_of[2] == pytest.approx(bytes_of[0] * 32 / (6 * 18 + 12))
    assert pooled.problem.workload.pool_positions == 70
    with pytest.raises(UserError, match=r"workload.pool_positions=-1; it must be 0 or more"):
        make(workload=WorkloadConfig(6, 20, 10, 12, 0, -1))


def test_where_a_pool_does_not_fit_its_size_is_the_remedy():
    """However many sequences share it: fewer would not make it smaller."""

    def build(pool):
        problem = make(workload=WorkloadConfig(6, 20, 10, pool_positions=pool), planner=PlannerConfig()).problem
        devices = tuple(replace(device, memory_bytes=6_000_000) for device in problem.devices)
        return replace(problem, devices=devices)

    with pytest.raises(UserError) as caught:
        solve(build(40_000))
    assert "sequences instead of" not in str(caught.value)
    kept, given = map(int, re.search(r"workload\.pool_positions=(\d+) instead of (\d+)", str(caught.value)).groups())
    assert given == 40_000
    assert memory_feasible(build(kept))
    assert not memory_feasible(build(kept + 256))


def test_devices_memory_and_links():
    built = make()
    problem, memory = built.problem, built.memory
    assert [(device.name, device.memory_bytes) for device in problem.devices] == [
        ("a:0", 1 << 30),
        ("a:1", 1 << 29),
        ("b:0", 1 << 28),
        ("b:1", 1 << 28),
    ]
    assert built.dtype == "float32"
    assert problem.memory.layer_bytes[4] == (memory.layer_bytes(4),) * 3
    assert problem.memory.kv_bytes_per_sequence_layer == 2 * 2 * 64 * 30 * 4
    assert problem.memory.workspace_bytes.decode[6] == memory.workspace_bytes(6, 1, 29, True)
    assert problem.memory.workspace_bytes.prefill[6] == memory.workspace_bytes(6, 20, 0, True)
    for source in problem.devices:
        for target in problem.devices:
            if source != target:
                link = problem.links.between(source.name, target.name)
                expected = cluster().link(source.name, target.name)
                assert (link.latency_seconds, link.seconds_per_byte) == (
                    expected.latency_seconds,
                    expected.seconds_per_byte,
                )
    assert len(problem.links.pairs) == 5  # two on each host and the exception; the rest is the default
    assert (problem.links.hidden_bytes_per_token, problem.links.token_bytes) == (1024, 8)


def test_unquantized_alone_needs_no_room_to_dequantize():
    alone = make(quant=QuantConfig(bits=[16])).problem.memory.workspace_bytes.decode[1]
    assert make().problem.memory.workspace_bytes.decode[1] - alone == 3 * 512 * 256 * 4


@pytest.mark.parametrize(
    ("kind", "dtype", "kernel", "kept"),
    [
        ("cpu", "bfloat16", DEQUANTIZE, KEPT_BYTES),
        ("cpu", "float32", DEQUANTIZE, 0),
        ("cpu", "bfloat16", OPENVINO_GRAPH, 0),
        ("cuda", "bfloat16", DEQUANTIZE, 0),
    ],
)
def test_onednn_keeps_kernels_in_bfloat16_on_cpus_where_stages_are_no_graphs(kind, dtype, kernel, kept):
    config = ClusterConfig(name="one")
    config.device_types = {"one": DeviceTypeConfig(kind, 1 << 30, 3e10, {"bfloat16": 1e11, "float32": 1e11}, 1e-4)}
    config.hosts = [HostConfig("a", [DeviceConfig("one", 0)])]
    built = make(cluster=Cluster.from_config(config), dtype=dtype, kernel=kernel)
    plain = MemoryModel(SHAPE, built.memory.groups, built.memory.dtype_bytes, kernel)
    workspace = built.problem.memory.workspace_bytes
    assert workspace.decode[6] - plain.workspace_bytes(6, 1, 29, True) == kept
    assert workspace.prefill[6] - plain.workspace_bytes(6, 20, 0, True) == kept


def test_per_channel_change_their_width_alone():
    settings = (QuantConfig(bits=[16, 4, 8], per_channel_bits=widths) for widths in ([], [8]))
    apart, rows = (make(quant=quant).problem.memory for quant in settings)
    saved = 2 * (SHAPE.linear_weights // 64 - sum(linear.out_features for linear in SHAPE.linears)) * 4
    assert apart.layer_bytes[8][0] - rows.layer_bytes[8][0] == saved > 0
    assert (apart.layer_bytes[4], apart.layer_bytes[16]) == (rows.layer_bytes[4], rows.layer_bytes[16])


def test_an_lm_head_of_fewer_bits_is_smaller_costs_quality_and_needs_a_device_that_has_the_width():
    sensitivity = Sensitivity("x", "measured", (4, 8), ((0.5, 0.25),) * 3, head={8: 0.125, 4: 0.75})
    tied = dataclasses.replace(SHAPE, tied_embeddings=True)
    plain, eight, four = (
        make(shape=tied, quant=QuantConfig(bits=[16, 4, 8], lm_head_bits=bits), sensitivity=sensitivity)
        for bits in (16, 8, 4)
    )
    saved = 256 * 100 * (4 - 1) - 2 * 256 * 100 // 64 * 4  # float32 to a byte, with a scale and a zero in groups of 64
    assert plain.problem.memory.head_bytes - eight.problem.memory.head_bytes == saved
    assert [built.problem.memory.tied_head for built in (plain, eight)] == [True, False]
    assert plain.problem.memory.head_bytes - plain.problem.memory.tied_bytes == 4 * 256  # the final norm alone
    for built, lost in ((plain, 0.0), (eight, 0.125), (four, 0.75)):
        assert built.problem.sensitivity[:2] == ((0.0, 0.5, 0.25),) * 2
        assert built.problem.sensitivity[2] == (lost, 0.5 + lost, 0.25 + lost)
    gpu, core = (eight.problem.device_types[name] for name in ("gpu", "core"))
    assert gpu.prefill_head_seconds == gpu.decode_head_seconds == {}
    assert set(core.decode_head_seconds) == {1, 2, 4, 6}
    assert set(four.problem.device_types["gpu"].decode_head_seconds) == {1, 2, 4, 6}
    assert "gpu has no kernel for quant.lm_head_bits=8" in eight.notes
    assert not any("kernel for quant.lm_head_bits" in note for note in (*plain.notes, *four.notes))


def test_whole_output_matrices_go_on_devices_whose_layers_cannot_be_whole():
    only = cluster()
    narrow = (
        dataclasses.replace(device, type=dataclasses.replace(device.type, bits=(4, 8))) for device in only.devices
    )  # fmt: skip
    only = dataclasses.replace(only, devices=tuple(narrow))
    problem = make(cluster=only, quant=QuantConfig(bits=[4, 8])).problem
    assert all(entry.decode_head_seconds for entry in problem.device_types.values())
    with pytest.raises(UserError, match="no device type of the cluster has that bit width; use one of 4, 8, 16"):
        make(cluster=only, quant=QuantConfig(bits=[4, 8], lm_head_bits=3))


def test_problem_survives_json():
    built = make()
    assert Problem.from_json(built.problem.to_json()) == built.problem


def test_captured_graphs_take_memory_in_both_phases_and_are_said_to_be_an_estimate():
    plain, captured = make().problem.memory, make(captured=True).problem.memory
    graphs = estimate_graph_bytes(1, 6, 2, 30)  # 3 layers and 6 sequences over 4 devices
    pool = {size: make().memory.captured_pool_bytes(size, 29, True) for size in (1, 2, 4, 6)}
    assert pool[6] > pool[1] > 0
    for size, value in plain.workspace_bytes.decode.items():
        assert captured.workspace_bytes.decode[size] == value + graphs + pool[size]
    for size, value in plain.workspace_bytes.prefill.items():
        assert captured.workspace_bytes.prefill[size] == value + graphs + pool[6]
    assert "captured graphs estimated, not measured" in make(captured=True).provenance["memory_bytes"]
    assert "graphs" not in make().provenance["memory_bytes"]


def test_passes_over_a_pool_copy_what_they_do_not_read_in_place():
    """Where they are captured they do read in place, and there is a graph for each number of rows alone."""
    slots, pool = (WorkloadConfig(6, 20, 10, 0, 0, positions) for positions in (None, 96))
    plain, copied = (make(workload=each).problem.memory.workspace_bytes for each in (slots, pool))
    memory = make().memory
    for size, value in plain.decode.items():
        assert copied.decode[size] == value + memory.gathered_bytes(size, 30)
    assert copied.prefill == plain.prefill
    captured = make(workload=pool, captured=True).problem.memory.workspace_bytes
    graphs = estimate_graph_bytes(1, 6, 2, 30, paged=True)
    for size, value in plain.decode.items():
        assert captured.decode[size] == value + graphs + memory.captured_pool_bytes(size, 29, True)


def test_origins_and_notes():
    built = make()
    assert built.provenance["sensitivity"] == "assumed (prior)"
    assert built.provenance["layer_seconds.core_x2"].startswith("roofline")
    assert "measured: here" in built.provenance["layer_seconds.core_x2"]
    assert built.provenance["kernel"] == "dequantize: counted from HQQ's code"
    assert make(make_costs=lambda _: CountedCosts()).provenance["layer_seconds.gpu"].startswith("fitted")
    assert [note for note in built.notes if "gpu has no kernel for 8 bits" in note]


def test_what_is_asked_for_does_not_count_against_the_default_bound():
    sensitivity = Sensitivity("x", "measured", (4, 8), ((0.5, 0.25),) * 3)
    built = make(quant=QuantConfig(bits=[4, 8]), sensitivity=sensitivity)
    assert built.problem.objective.limit == 0.77
    said = "quant.bits=[4, 8], quant.lm_head_bits and pins lose 0.75 nats per token at least; "
    assert any(note.startswith(said) for note in built.notes)
    pinned = make(sensitivity=sensitivity, planner=PlannerConfig(pins={"bits": {0: 8}}))
    assert pinned.problem.objective.limit == 0.27
    strict = PlannerConfig(mode="max_quality_loss")
    built = make(quant=QuantConfig(bits=[4, 8]), sensitivity=sensitivity, planner=strict)
    assert built.problem.objective.limit == 0.02


def test_sensitivities_are_taken_in_the_order_of_bits():
    sensitivity = Sensitivity("x", "measured", (8, 4), ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0)))
    assert make(sensitivity=sensitivity).problem.sensitivity == ((0.0, 2.0, 1.0), (0.0, 4.0, 3.0), (0.0, 6.0, 5.0))
    with pytest.raises(UserError, match="2 layers"):
        make(sensitivity=dataclasses.replace(sensitivity, table=sensitivity.table[:2]))


def test_objectives():
    default = make().problem.objective
    assert (default.mode, default.theta, default.limit) == ("max_quality_loss", 2.0, 0.02)
    free = make(planner=PlannerConfig(theta=2.0, max_quality_loss=None)).problem
    assert free.objective == Objective("theta", theta=2.0)
    for problem in (make().problem, free):
        assert Problem.from_json(problem.to_json()) == problem
    bounded = make(planner=PlannerConfig(mode="max_quality_loss", max_quality_loss=0.5)).problem.objective
    assert (bounded.mode, bounded.limit) == ("max_quality_loss", 0.5)
    bounded = make(planner=PlannerConfig(mode="max_latency", max_latency_seconds=9.0)).problem.objective
    assert (bounded.mode, bounded.limit) == ("max_latency", 9.0)


@pytest.mark.parametrize(
    ("sequences", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))]
)
def test_default_micro_batches(sequences, sizes):
    assert make(workload=WorkloadConfig(sequences, 20, 10)).problem.micro_batches.decode == sizes


def test_given_micro_batches():
    given = PlannerConfig(micro_batches=MicroBatchesConfig(prefill=[3], decode=[2, 5]))
    sizes = make(planner=given).problem.micro_batches
    assert (sizes.prefill, sizes.decode) == ((3,), (2, 5))


def test_fixed_order_is_passed_on():
    assert make(planner=PlannerConfig(device_order="fixed")).problem.device_order == "fixed"


def test_widths_that_cannot_be_packed_are_left_out_with_a_reason():
    """intermediate 72 does not divide into groups of 64; without 16 nothing is left."""
    odd = ModelShape.from_config({**LLAMA, "intermediate_size": 72})
    kept, notes = usable_bits(odd, QuantConfig(bits=[4, 16]))
    assert kept == [16]
    assert "mlp.down_proj" in notes[0]
    with pytest.raises(UserError, match=r"no bit width of quant\.bits=\[4, 8\]"):
        make(shape=odd, quant=QuantConfig(bits=[4, 8]))
    assert usable_bits(odd, QuantConfig(bits=[4], group_size=8))[0] == [4]
    assert usable_bits(odd, QuantConfig(bits=[4, 8], per_channel_bits=[8]))[0] == [8]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workload": WorkloadConfig(6, 60, 10)}, r"= 70 exceeds the model's 64 positions; lower one of them by 6"),
        ({"workload": WorkloadConfig(0, 20, 10)}, r"workload\.sequences=0"),
        ({"workload": WorkloadConfig(6, None, 1)}, r"workload\.prompt_tokens=None"),
        ({"workload": WorkloadConfig(6, 20, 0)}, r"workload\.generated_tokens=0"),
        ({"quant": QuantConfig(bits=[])}, "is empty"),
        ({"quant": QuantConfig(lm_head_bits=5)}, "quant.lm_head_bits=5; it must be one of"),
        ({"quant": QuantConfig([16], group_size=24, lm_head_bits=4)}, "lm_head of 100 x 256 cannot be packed"),
        (
            {
                "quant": QuantConfig([16], lm_head_bits=4),
                "sensitivity": Sensitivity("x", "measured", (4,), ((1.0,),) * 3),
            },
            "make it again with quant.lm_head_bits=4",
        ),
        ({"quant": QuantConfig(bits=[5])}, "each width once"),
        ({"quant": QuantConfig(bits=[4, 4])}, "each width once"),
        ({"quant": QuantConfig(bits=[4], axis=2)}, "quant.axis is 2"),
        (
            {"quant": QuantConfig(bits=[16], per_channel_bits=[16])},
            r"quant\.per_channel_bits=\[16\]: list each width once, of 1, 2",
        ),
        ({"quant": QuantConfig(bits=[8], axis=0, per_channel_bits=[8])}, r"not axis 0; set quant\.axis=1"),
        ({"planner": PlannerConfig(mode="max_latency")}, r"set planner\.max_latency_seconds"),
        ({"planner": PlannerConfig(mode="max_quality_loss", max_quality_loss=None)}, r"set planner\.max_quality_loss"),
        ({"planner": PlannerConfig(mode="fast")}, "'fast'"),
        ({"planner": PlannerConfig(micro_batches=MicroBatchesConfig(prefill=[]))}, "prefill is empty"),
        ({"planner": PlannerConfig(micro_batches=MicroBatchesConfig(decode=[7]))}, "from 1 to 6"),
        ({"planner": PlannerConfig(device_order="sorted")}, "device_order"),
        ({"dtype": "bfloat16"}, "does not compute in bfloat16"),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(UserError, match=words):
        make(**changes)


def test_bloom_has_no_bound_on_positions():
    bloom = ModelShape.from_config(
        {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50}
    )
    assert make(shape=bloom, workload=WorkloadConfig(2, 9000, 10)).problem.layers == 2


def test_rooms_stay_free_of_torch():
    """Planning imports neither torch nor transformers nor deepspeed."""
    import subprocess
    import sys

    code = (
        "import sys, ds_llmpq.planner.build, ds_llmpq.cluster.detect, ds_llmpq.cluster.rates\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'hqq') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
