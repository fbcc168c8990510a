"""A profile in planning: its times and links reach the problem, and a plan can be simulated through."""

import dataclasses
import random

import pytest

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig
from ds_llmpq.cost.linktable import Message, write_links
from ds_llmpq.cost.profile import Point, Sample, append, current_setup, write_header
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.plan import Assignment, StageAssignment
from ds_llmpq.planner import evaluate
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.planner.cost_source import load_profile_costs
from ds_llmpq.planner.simulation import simulate_plan
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import make_groups

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
)
WORKLOAD, QUANT = WorkloadConfig(8, 32, 9), QuantConfig(bits=[4, 16])
OVERHEAD = {"first": 0.001, "middle": 0.002, "last": 0.003}


def cluster(count=3):
    config = ClusterConfig(name="here")
    config.device_types = {"core": DeviceTypeConfig("cpu", 1 << 30, 2e10, {"float32": 1e11}, 1e-4)}
    config.hosts = [HostConfig("localhost", [DeviceConfig("core", slot) for slot in range(count)])]
    config.links.intra_host = LinkConfig(1e-5, 1e10)
    return Cluster.from_config(config)


@pytest.fixture
def folder(tmp_path):
    """Layers take a second a sequence, so that where a number comes from is plain to see."""
    write_header(tmp_path / "profile.csv", current_setup(SHAPE, "float32", DEQUANTIZE, make_groups(QUANT)), {})
    points = [
        (Point("core", "layer", phase, bits, batch, length), float(batch))
        for phase in ("prefill", "decode")
        for bits in (4, 16)
        for batch in (1, 2, 4, 8)
        for length in (16, 36, 40)
    ]
    for part, seconds in OVERHEAD.items():
        points += [(Point("core", part, f, 0, b, 1), seconds) for f in ("prefill", "decode") for b in (1, 4, 8)]
    append(tmp_path / "profile.csv", [Sample(point, 0, 3, 3, time, time, 0.0) for point, time in points])
    write_links(
        tmp_path / "links.csv",
        [Message("localhost:0", "localhost:1", "activation", s, 9, 1.0, 0.5 + s * 1e-6) for s in (8, 1 << 16)],
    )
    return tmp_path


def prepared(folder, count=3, **changes):
    planner = PlannerConfig(profile=str(folder), **changes)
    make_costs, here = load_profile_costs(planner, QUANT, cluster(count), SHAPE, "auto", DEQUANTIZE)
    return prepare(here, SHAPE, WORKLOAD, QUANT, planner, make_costs=make_costs)


def test_fitted_times_overheads_and_links_reach_the_problem(folder):
    built = prepared(folder)
    core = built.problem.device_types["core"]
    # one middle stage of three; its overhead is spread over six layers
    assert core.decode_layer_seconds[16][4] == pytest.approx(4.0 + OVERHEAD["middle"] / 6, rel=0.01)
    assert core.prefill_layer_seconds[4][8] == pytest.approx(8.0 + OVERHEAD["middle"] / 6, rel=0.01)
    assert core.decode_head_seconds[4] == pytest.approx(OVERHEAD["last"], rel=0.2)
    assert core.prefill_embed_seconds[4] == pytest.approx(OVERHEAD["first"], rel=0.2)
    link = built.problem.links.between("localhost:0", "localhost:1")
    assert (link.latency_seconds, link.seconds_per_byte) == pytest.approx((0.5, 1e-6))
    assert built.problem.links.between("localhost:1", "localhost:0").latency_seconds == 1e-5
    assert built.provenance["layer_seconds.core"].startswith("fitted")
    assert built.provenance["links"].startswith("measured (links.csv); other pairs: ")
    assert not [note for note in built.notes if "extrapolated" in note]


def test_two_devices_have_no_middle_stage(folder):
    core = prepared(folder, count=2).problem.device_types["core"]
    assert core.decode_layer_seconds[16][4] == pytest.approx(4.0, rel=0.001)


def test_without_a_profile_nothing_changes():
    here = cluster()
    assert load_profile_costs(PlannerConfig(), QUANT, here, SHAPE, "auto", DEQUANTIZE) == (None, here)


def test_mistakes_are_said(folder, tmp_path):
    with pytest.raises(UserError, match="neither a profile nor a folder"):
        prepared(tmp_path / "nowhere")
    wide = dataclasses.replace(QUANT, group_size=128)
    with pytest.raises(UserError, match=r"group_size 64, but group_size 128 .*profile_force=true"):
        load_profile_costs(PlannerConfig(profile=str(folder)), wide, cluster(), SHAPE, "auto", DEQUANTIZE)
    rows = dataclasses.replace(QUANT, per_channel_bits=[8])
    with pytest.raises(UserError, match=r"per_channel_bits \[\], but per_channel_bits \[8\] is in use; profile again"):
        load_profile_costs(PlannerConfig(profile=str(folder)), rows, cluster(), SHAPE, "auto", DEQUANTIZE)


def test_a_played_plan_is_close_to_its_formula(folder):
    """With steady stages and cheap links they differ by a fill of the pipeline at most."""
    problem, generator = prepared(folder).problem, random.Random(5)
    for _ in range(20):
        cuts = [0, *sorted(generator.sample(range(1, 6), 1)), 6]
        devices = generator.sample(["localhost:1", "localhost:2"], 2)
        stages = tuple(
            StageAssignment(d, a, b, (16,) * (b - a)) for d, a, b in zip(devices, cuts, cuts[1:], strict=False)
        )
        assignment = Assignment(stages, generator.choice([1, 2, 4, 8]), generator.choice([1, 2, 4, 8]))
        prediction, simulated = evaluate(problem, assignment), simulate_plan(problem, assignment)
        fill = sum(prediction.stage_prefill_seconds) + sum(prediction.stage_decode_seconds)
        assert abs(simulated.latency_seconds - prediction.latency_seconds) <= 1.01 * fill
        assert {event["name"] for event in simulated.chrome_events()} >= {"prefill", "decode"}


def test_a_partial_micro_batch_counts_as_the_next_larger_candidate(folder):
    planner = PlannerConfig(profile=str(folder))
    planner.micro_batches.prefill, planner.micro_batches.decode = [3, 8], [8]
    make_costs, here = load_profile_costs(planner, QUANT, cluster(2), SHAPE, "auto", DEQUANTIZE)
    problem = prepare(here, SHAPE, WORKLOAD, QUANT, planner, make_costs=make_costs).problem
    simulated = simulate_plan(problem, Assignment((StageAssignment("localhost:0", 0, 6, (16,) * 6),), 3, 8))
    prefill = [span.seconds for span in simulated.spans if span.name == "prefill"]
    assert len(prefill) == 3  # 3 + 3 + 2 rows
    assert prefill[0] == prefill[2]
