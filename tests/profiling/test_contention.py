"""Contention is found from the period of a pipeline's passes, and reaches plans of several stages alone."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig, LinksConfig
from ds_llmpq.cost.profile import CONTENTION, Point, Profile, Sample, append, current_setup, write_header
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.plan import Assignment, PlannedModel, SolverReport, StageAssignment
from ds_llmpq.planner import evaluate
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.planner.cost_source import load_profile_costs
from ds_llmpq.planner.deploy import compose_plan, deploy
from ds_llmpq.planner.problem import Problem
from ds_llmpq.profiling.contention import MICRO_BATCHES, find_contention, is_contended, list_contention
from ds_llmpq.profiling.points import TimingTask
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import make_groups
from ds_llmpq.scheduler.micro_batch import MicroBatchLimits
from ds_llmpq.scheduler.simulator import simulate
from ds_llmpq.serving.prediction import PlanTimes

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
)
QUANT, WORKLOAD = QuantConfig(bits=[16]), WorkloadConfig(8, 32, 9)
LAYER, END, FIRST, LAST = 1.0, 0.5, 0.25, 0.5  # seconds
SECONDS = st.floats(0.01, 1.0)


@dataclass
class Times:
    works: list[float]
    hop_seconds: float
    back_seconds: float

    @property
    def stages(self):
        return len(self.works)

    def work(self, stage, *_):
        return self.works[stage]

    def hop(self, *_):
        return self.hop_seconds

    def back(self, *_):
        return self.back_seconds


@given(st.lists(SECONDS, min_size=2, max_size=3), st.floats(0, 0.5), st.floats(0, 0.01), st.floats(0, 0.01))
def test_the_simulated_period_gives_back_what_each_stage_had_on_top(works, share, hop, back):
    contention = share * max(works)

    def run(generated):
        times = Times([work + contention for work in works], hop, back)
        return simulate(times, [(4, generated)] * MICRO_BATCHES, MICRO_BATCHES, MicroBatchLimits(1, 4, 1))

    passes = 40
    period = (run(60).latency_seconds - run(60 - passes).latency_seconds) / (MICRO_BATCHES * passes)
    messages = (len(works) - 1) * hop + back
    # a middle stage asks for hidden states only when it knows the tokens: then the slowest one waits for a message too
    assert contention - 1e-9 <= find_contention(period, works, messages) <= contention + messages + 1e-9
    assert find_contention(10 * period, works, messages) <= 0.5 * max(works)


@given(st.lists(SECONDS, min_size=2, max_size=3), st.floats(0.1, 0.99))
def test_passes_faster_than_their_works_have_none(works, share):
    assume(max(works) >= sum(works) / MICRO_BATCHES)
    assert find_contention(share * max(works), works, 0.0) == 0.0


def cluster(shares=(None, None)):
    kind = DeviceTypeConfig("cpu", 1 << 30, 2e10, {"float32": 1e11}, 1e-4)
    names = [f"core{index}" for index in range(len(shares))]
    entries = enumerate(zip(names, shares, strict=True))
    devices = [DeviceConfig(name, slot, cpu_share=share) for slot, (name, share) in entries]
    links = LinksConfig(LinkConfig(1e-5, 1e10), LinkConfig(1e-5, 1e10))
    return Cluster.from_config(
        ClusterConfig("here", dict.fromkeys(names, kind), [HostConfig("localhost", devices)], links)
    )


def layer_samples(name, seconds, end=0.0):
    parts = {"layer": (16, seconds), "embed": (0, end), "head": (0, end), "first": (0, FIRST), "last": (0, LAST)}
    return [
        Sample(Point(name, part, phase, bits, batch, length), 0, 3, 3, time, time, 0.0)
        for part, (bits, time) in parts.items()
        for phase in ("prefill", "decode")
        for batch in (1, 2, 4)
        for length in ((16, 36) if part == "layer" else (1,))
    ]


def setup():
    return current_setup(SHAPE, "float32", DEQUANTIZE, make_groups(QUANT))


@pytest.mark.parametrize("shares", [(None, None), (1.0, 0.5)])
def test_the_trials_periods_become_samples_of_both_types(shares):
    """Two layers a stage: works of 2.75 and 3 s; a device's share stretches its times, but not the trial's parts."""
    here = cluster(shares)
    samples = [
        sample
        for device in here.devices
        for sample in layer_samples(device.type.name, *(time / (device.cpu_share or 1.0) for time in (LAYER, END)))
    ]
    links = [{"channel": name, "bytes": size, "seconds": [0.1]} for name in ("activation", "token") for size in (8, 64)]
    periods = [{"batch": rows, "past": 20, "round": 1, "seconds": 3 + 0.125 * rows} for rows in (1, 2, 4)]
    profile = Profile(setup(), tuple(samples))
    found = list_contention({"links": links, "periods": periods}, 2, list(here.devices), profile, SHAPE)
    assert {sample.point.device_type for sample in found} == {device.type.name for device in here.devices}
    for sample in found:
        point = sample.point
        assert (point.part, point.phase, point.bits) == (CONTENTION, "decode", 0)
        # of (2 x period - 5.75 - 0.2) / 2 and period - 3 the lesser
        assert sample.median_seconds == pytest.approx(0.125 * point.batch, rel=0.02)


def test_where_a_device_runs_no_unquantized_layers_a_trial_has_none_that_were_timed():
    devices = list(cluster().devices)
    task = TimingTask("", SHAPE, WORKLOAD, QUANT, "float32", (8, 16), {}, setup())
    assert is_contended(task, devices, 2)
    other = replace(devices[1], type=replace(devices[1].type, bits=(8,)))
    assert not is_contended(task, [devices[0], other], 2)


@pytest.fixture
def built(tmp_path):
    write_header(tmp_path / "profile.csv", setup(), {})
    rounds = [(1, 0.0), (1, 0.5), (2, 0.25), (2, 0.35), (4, 0.35), (4, 9.0)]  # the last was disturbed
    contention = [
        Sample(Point(name, CONTENTION, "decode", 0, batch, 1), index, 1, 1, seconds, seconds, 0.0)
        for name in ("core0", "core1")
        for index, (batch, seconds) in enumerate(rounds)
    ]
    layers = [sample for name in ("core0", "core1") for sample in layer_samples(name, LAYER)]
    append(tmp_path / "profile.csv", [*layers, *contention])
    planner = PlannerConfig(profile=str(tmp_path))
    make_costs, here = load_profile_costs(planner, QUANT, cluster(), SHAPE, "auto", DEQUANTIZE)
    return prepare(here, SHAPE, WORKLOAD, QUANT, planner, make_costs=make_costs)


def test_plans_of_several_stages_have_it_in_each_pass_and_those_of_one_have_none(built):
    contention = (0.0 + 0.5 + 0.25 + 0.35 + 0.35 + 0.7) / 6  # the last counts for twice the median
    assert built.problem.device_types["core0"].contention_seconds == pytest.approx(contention)
    one = Assignment((StageAssignment("localhost:0", 0, 4, (16,) * 4),), 4, 4)
    two = Assignment(tuple(StageAssignment(f"localhost:{j}", 2 * j, 2 * j + 2, (16, 16)) for j in (0, 1)), 4, 4)
    for assignment, expected in ((one, [4 + FIRST + LAST]), (two, [2 + FIRST + contention, 2 + LAST + contention])):
        predicted = evaluate(built.problem, assignment)
        assert predicted.stage_decode_seconds == pytest.approx(expected, rel=0.02)
        plan = compose_plan(built.problem, assignment, predicted, SolverReport("hand", 1.0, None, None, 0.0, "checked"))
        times = PlanTimes(deploy(plan, cluster(), built, PlannedModel(None), QUANT, DEQUANTIZE))
        assert [times.work(j, "decode", 4, 1, 36) for j in range(times.stages)] == pytest.approx(expected, rel=0.02)


def test_a_problem_cannot_have_more_of_it_than_its_ends_take(built):
    problem = built.problem.to_json()
    problem["device_types"]["core0"]["contention_seconds"] = 7.0
    with pytest.raises(
        UserError, match=r"core0.contention_seconds is 7, but must be at most 0.6\d*, the least of prefill_embed"
    ):
        Problem.from_json(problem)


def test_a_type_is_faster_alone_by_either(built):
    kind = replace(built.problem.device_types["core0"], contention_seconds=0.0)
    assert not kind.faster_alone
    assert replace(kind, decode_alone_share=0.9).faster_alone
    assert replace(kind, contention_seconds=0.1).faster_alone
