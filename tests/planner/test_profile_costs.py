"""A profile in planning: its times and links reach the problem, and a plan can be simulated through."""

import dataclasses
import random

import pytest

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig
from ds_llmpq.cost.linktable import Message, write_links
from ds_llmpq.cost.profile import Point, Sample, append, current_setup, write_header
from ds_llmpq.engine.batch_limits import build_limits
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.plan import Assignment, PlannedModel, SolverReport, StageAssignment
from ds_llmpq.planner import evaluate
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.planner.cost_source import load_profile_costs
from ds_llmpq.planner.deploy import compose_plan, deploy
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.kernels.openvino import OPENVINO_GRAPH
from ds_llmpq.quant.packing import Groups, make_groups
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.serving.metrics import expect, summarize
from ds_llmpq.serving.prediction import PlanTimes, simulate_streams, simulate_workload, sum_seconds

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


def prepared(folder, count=3, workload=WORKLOAD, **changes):
    planner = PlannerConfig(profile=str(folder), **changes)
    make_costs, here = load_profile_costs(planner, QUANT, cluster(count), SHAPE, "auto", DEQUANTIZE)
    return prepare(here, SHAPE, workload, QUANT, planner, make_costs=make_costs)


def deployed(built, assignment, here):
    report = SolverReport("by hand", 1.0, None, None, 0.0, "checked")
    plan = compose_plan(built.problem, assignment, evaluate(built.problem, assignment), report)
    return deploy(plan, here, built, PlannedModel(None), QUANT, DEQUANTIZE)


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


def test_what_left_out_points_are_off_by_reaches_the_problem_phase_by_phase(folder):
    steady = prepared(folder).problem.device_types["core"]
    assert steady.prefill_error < 0.01
    rows = (folder / "profile.csv").read_text().splitlines()
    disturbed = "core,layer,decode,16,8,40,"  # what a program that had the processor meanwhile leaves
    (place,) = (i for i, row in enumerate(rows) if row.startswith(disturbed))
    rows[place] = rows[place].replace(",8,8,0", ",80,80,0")
    (folder / "profile.csv").write_text("\n".join(rows) + "\n")
    built = prepared(folder)
    core = built.problem.device_types["core"]
    assert core.prefill_error == steady.prefill_error
    assert core.decode_error > steady.decode_error + 0.05
    said = (
        f"left-out points off by {100 * core.prefill_error:.1f} % in prefill and {100 * core.decode_error:.1f} % in "
        "decode on average"
    )
    assert said in built.provenance["layer_seconds.core"]


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
    for zeros, kept in (("whole", "real"), ("real", "whole")):
        groups = [Groups(zeros=kind) for kind in (zeros, kept)]
        used, found = (current_setup(SHAPE, "bfloat16", OPENVINO_GRAPH, kind) for kind in groups)
        assert found.disagreement(used) == f"zeros {kept}, but zeros {zeros} is in use"
        used, found = (current_setup(SHAPE, "bfloat16", DEQUANTIZE, kind) for kind in groups)
        assert found == used, "its times do not depend on them"
    rows = dataclasses.replace(QUANT, per_channel_bits=[8])
    with pytest.raises(UserError, match=r"per_channel_bits \[\], but per_channel_bits \[8\] is in use; profile again"):
        load_profile_costs(PlannerConfig(profile=str(folder)), rows, cluster(), SHAPE, "auto", DEQUANTIZE)


def test_a_simulated_plan_is_close_to_its_formula(folder):
    """With steady stages and cheap links they differ by a fill of the pipeline at most."""
    built, generator = prepared(folder), random.Random(5)
    for _ in range(20):
        cuts = [0, *sorted(generator.sample(range(1, 6), 1)), 6]
        devices = generator.sample(["localhost:1", "localhost:2"], 2)
        stages = tuple(
            StageAssignment(d, a, b, (16,) * (b - a)) for d, a, b in zip(devices, cuts, cuts[1:], strict=False)
        )
        assignment = Assignment(stages, generator.choice([1, 2, 4, 8]), generator.choice([1, 2, 4, 8]))
        prediction = evaluate(built.problem, assignment)
        (simulated,) = simulate_workload(deployed(built, assignment, cluster()), EngineConfig())
        fill = sum(prediction.stage_prefill_seconds) + sum(prediction.stage_decode_seconds)
        assert abs(simulated.latency_seconds - prediction.latency_seconds) <= 1.01 * fill
        assert {event["name"] for event in simulated.build_chrome_events()} >= {"prefill", "decode"}


def test_passes_of_a_plan_are_priced_by_their_own_size(folder):
    """The planned size as the planner has it; a part of it by what the same costs say, which is not its share."""
    built, here = prepared(folder), cluster()
    stages = [StageAssignment(f"localhost:{j}", a, a + 2, (16, 4)) for j, a in enumerate((0, 2, 4))]
    plan = deployed(built, Assignment(tuple(stages), 4, 8), here)
    costs, times = built.costs["core"], PlanTimes(plan)
    middle = OVERHEAD["middle"] / 6 * 2  # the formula spreads a middle stage's overhead over all layers
    for index, own in enumerate(("first", "middle", "last")):
        stage = plan.stages[index]
        for phase, rows, tokens, past, planned in (
            ("prefill", 4, 32, 0, stage.prefill_seconds),
            ("decode", 8, 1, 36, stage.decode_seconds),
        ):
            expected = planned - middle + (OVERHEAD["middle"] if own == "middle" else 0.0)
            assert times.work(index, phase, rows, tokens, past) == pytest.approx(expected, rel=1e-3)
        for rows, tokens in ((1, 7), (3, 20), (2, 64), (1, 128)):
            layers = sum(costs.prefill_seconds(bits, rows, tokens) for bits in (16, 4))
            assert times.work(index, "prefill", rows, tokens, 0) == pytest.approx(layers, rel=0.1)  # steps are smoothed
        layers = sum(costs.decode_seconds(bits, 3, 33) for bits in (16, 4))
        assert times.work(index, "decode", 3, 1, 33) == pytest.approx(layers, rel=0.1)  # steps are smoothed
    long, half = (times.work(1, "prefill", 2, tokens, 0) for tokens in (64, 32))
    assert times.work(1, "prefill", 2, 32, 32) >= max(long - half, half)  # behind a prefix of as many tokens
    assert times.work(1, "prefill", 1, 8, 0) > 1.5 * plan.stages[1].prefill_seconds * 8 / (4 * 32)


def test_the_first_pass_of_a_size_costs_each_stage_more_once(folder):
    for part, seconds in (("new_size", 7.0), ("new_size_mixed", 11.0)):
        points = [Point("core", part, "prefill", 0, 1, size) for size in (8, 16, 32)]
        append(folder / "profile.csv", [Sample(point, 0, 1, 1, seconds, seconds, 0.0) for point in points])
    plan = deployed(prepared(folder), Assignment((StageAssignment("localhost:0", 0, 6, (16,) * 6),), 4, 8), cluster())
    assert plan.stages[0].first_pass_seconds == 7.0
    mixed = Assignment((StageAssignment("localhost:0", 0, 6, (16,) * 5 + (4,)),), 4, 8)
    assert deployed(prepared(folder), mixed, cluster()).stages[0].first_pass_seconds == 11.0
    times = PlanTimes(plan)
    first, second = (times.work(0, "prefill", 2, 8, 0) for _ in range(2))
    assert first - second == pytest.approx(7.0)
    assert times.work(0, "decode", 16, 1, 36) == times.work(0, "decode", 16, 1, 36)  # as many tokens as 2 x 8
    assert PlanTimes(plan).work(0, "prefill", 2, 8, 0) == first


@pytest.mark.parametrize("shared", [0, 16])
def test_a_plan_and_the_verdict_of_a_run_predict_the_same_of_the_same_requests(folder, shared):
    points = [Point("core", "new_size", "prefill", 0, 1, size) for size in (8, 16, 32)]
    append(folder / "profile.csv", [Sample(point, 0, 1, 1, 7.0, 7.0, 0.0) for point in points])
    workload = dataclasses.replace(WORKLOAD, shared_tokens=shared)
    built, stages = prepared(folder, workload=workload), [("localhost:1", 0, 4), ("localhost:2", 4, 6)]
    stages = tuple(StageAssignment(device, a, b, (16,) * (b - a)) for device, a, b in stages)
    plan = deployed(built, Assignment(stages, 4, 8), cluster())
    options, count = EngineConfig(), workload.sequences
    seconds = sum_seconds(simulate_workload(plan, options))
    plain = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, first_pass_seconds=0.0) for s in plan.stages))
    assert seconds >= sum_seconds(simulate_workload(plain, options)) + 2 * 7.0
    requests = [(workload.prompt_tokens, workload.generated_tokens)] * count
    limits = build_limits(plan, options, True, False, shared)
    streams = [(count, requests, [shared] * count, [sum(requests[0])] * count)]
    assert expect(plan, streams, limits, shared)["latency_seconds"] == seconds
    ran = [(1, [(shared, 1)], (), ())] * (shared > 0) + streams
    found = summarize(plan, {}, [], [], 0.0, simulate_streams(plan, ran, limits))["predicted_against_measured"]
    assert found["latency_seconds"]["predicted"] == seconds


def test_rows_whose_tokens_are_drawn_cost_the_last_stage_more(folder):
    points = [Point("core", "draw", "decode", 0, size, 1) for size in (1, 4, 8)]
    append(folder / "profile.csv", [Sample(point, 0, 1, 1, 5.0, 5.0, 0.0) for point in points])
    planner, here = PlannerConfig(profile=str(folder)), cluster()
    overheads = [
        load_profile_costs(planner, QUANT, here, SHAPE, "auto", DEQUANTIZE, drawn_share=share)[0](
            here.device_types["core"]
        ).pass_overhead("decode", 4, 1)
        for share in (0.0, 0.5)
    ]
    assert overheads[0].last == pytest.approx(OVERHEAD["last"], rel=0.01)
    assert overheads[1] == dataclasses.replace(overheads[0], last=overheads[0].last + 4 * 0.5 * 5.0)


def test_a_plan_without_times_by_size_counts_tokens_in_proportion(folder):
    plan = deployed(prepared(folder), Assignment((StageAssignment("localhost:0", 0, 6, (16,) * 6),), 4, 8), cluster())
    stage = dataclasses.replace(plan.stages[0], prefill_times=None, decode_times=None, first_pass_seconds=7.0)
    times = PlanTimes(dataclasses.replace(plan, stages=(stage,)))
    assert times.work(0, "prefill", 1, 16, 0) == pytest.approx(stage.prefill_seconds / 8)
    assert times.work(0, "decode", 1, 1, 3) == stage.decode_seconds


def test_what_would_take_long_to_simulate_is_not(folder):
    plan = deployed(prepared(folder), Assignment((StageAssignment("localhost:0", 0, 6, (16,) * 6),), 4, 8), cluster())
    streams = [(8, [(4, 3)] * 8, (), ())] * 3  # counted as eight prefill and three decode passes
    limits = MicroBatchLimits(4, 128, 8)
    assert len(simulate_streams(plan, streams, limits, most_passes=33)) == 3
    assert simulate_streams(plan, streams, limits, most_passes=32) is None
    assert simulate_streams(plan, [], limits) is None
