"""Profiling of a small checkpoint: real parts, resumption after an interruption, refusal of another setup."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from make_checkpoint import make_checkpoint

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig, DeviceConfig, DeviceTypeConfig, HostConfig, LinkConfig
from ds_llmpq.cost.fit import fit_profile
from ds_llmpq.cost.memory import MemoryModel
from ds_llmpq.cost.profile import Point, current_setup, read_profile
from ds_llmpq.engine.runner.capture import capture_trace
from ds_llmpq.engine.throttle import CpuShare
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import read_shape
from ds_llmpq.planner.config import WorkloadConfig
from ds_llmpq.profiling import profiler
from ds_llmpq.profiling.config import ProfilingConfig
from ds_llmpq.profiling.parts import Parts
from ds_llmpq.profiling.points import ProfilingTask, plan_points
from ds_llmpq.profiling.timer import Timer
from ds_llmpq.profiling.trial_process import run_trial
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import count_stored_bytes
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import make_groups

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "opt", "bloom")
WORKLOAD = WorkloadConfig(4, 12, 6)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(arch):
        if arch not in made:
            out = tmp_path_factory.mktemp(arch)
            made[arch] = make_checkpoint(out, arch, layers=3, hidden=128, heads=4, vocab=300, tokenizer=None)
        return made[arch]

    return get


def task(path, seconds=0.5, **changes):
    shape, quant = read_shape(path), QuantConfig(bits=[4, 16])
    sizes = {"prefill": [1, 4], "decode": [2, 4]}
    setup = current_setup(shape, "float32", DEQUANTIZE, make_groups(quant))
    config = ProfilingConfig(seconds=seconds, rounds=2, links=False, chained_layers=2)
    made = ProfilingTask(str(path), shape, WORKLOAD, quant, "float32", (4, 16), sizes, setup, profiling=config)
    return replace(made, **changes)


def cluster(*devices):
    config = ClusterConfig(name="here")
    config.device_types = {"core": DeviceTypeConfig("cpu", 1 << 28, 2e10, {"float32": 1e11}, 1e-4)}
    config.hosts = [HostConfig("localhost", list(devices) or [DeviceConfig("core", 0)])]
    config.links.intra_host = LinkConfig(1e-5, 1e10)
    return Cluster.from_config(config)


def silent(*_):
    """Shows no progress."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_point_runs_on_the_engines_own_parts(folder, arch):
    made = task(folder(arch))
    parts = Parts(made.path, made.shape, (4, 16), made.quant, "float32", CPU, 4, 18, 2)
    with torch.inference_mode():
        for group in plan_points("core", [4, 16], made.sizes, WORKLOAD):
            for point in group:
                action, times = parts.action(point)
                action()
                assert times == (2 if point.part == "layer" else 1)


def test_decode_parts_that_are_captured_compute_the_same(folder):
    made = task(folder("llama"))
    arguments = made.path, made.shape, (4, 16), made.quant, "float32", CPU, 4, 18, 2
    eager, captured = Parts(*arguments), Parts(*arguments, capture=capture_trace)
    with torch.inference_mode():
        for point in (Point("core", "layer", "decode", 4, 3, 10), Point("core", "head", "decode", 0, 2, 1)):
            (action, times), (replay, again) = eager.action(point), captured.action(point)
            assert times == again
            assert torch.allclose(action(), replay(), atol=1e-5)
            assert torch.equal(replay(), replay())
        prefill = Point("core", "layer", "prefill", 16, 2, 8)
        assert torch.equal(eager.action(prefill)[0](), captured.action(prefill)[0]())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_model_is_what_the_loader_allocates(folder, arch, dtype):
    """For every width: decoder layers, embedding, head, cache."""
    path, widths = folder(arch), [1, 2, 3, 4, 8, 16]
    shape, quant = read_shape(path), QuantConfig()
    parts = Parts(path, shape, widths, quant, dtype, CPU, 4, 18, 2)
    model = MemoryModel(shape, make_groups(quant), getattr(torch, dtype).itemsize)
    for bits in widths:
        for layer in parts.layers[bits]:
            assert count_stored_bytes(layer) == model.layer_bytes(bits), f"{bits} bits"
    assert count_stored_bytes(parts.embedding) == model.embed_bytes()
    assert count_stored_bytes(parts.head) == model.head_bytes()
    assert parts.store.allocated_bytes == 2 * 4 * model.kv_bytes_per_sequence_layer(18)
    both = torch.nn.ModuleList([parts.embedding, parts.head])  # loaded by one loader: a tied head is shared
    shared = model.shares_embedding * shape.lm_head.weights * model.dtype_bytes
    assert count_stored_bytes(both) == model.embed_bytes() + model.head_bytes() - shared


def test_an_interrupted_profile_goes_on(folder, tmp_path):
    made, here = task(folder("llama")), cluster()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiler.profile(made, here, tmp_path, False, stop)
    file = tmp_path / "profile.csv"
    before = read_profile(file).samples
    assert len(before) == 20
    with file.open("a") as partial:
        partial.write("core,layer,pre")  # killed in the middle of a row
    profiler.profile(replace(made, profiling=replace(made.profiling, seconds=60)), here, tmp_path, False, silent)
    after = read_profile(file).samples
    assert after[:20] == before
    keys = [(sample.point, sample.round) for sample in after]
    assert len(keys) == len(set(keys))
    points = [point for group in plan_points("core", [4, 16], made.sizes, WORKLOAD) for point in group]
    assert {(point, turn) for point in points for turn in range(2)} == {
        key for key in keys if not key[0].part.startswith("new_size")
    }
    assert sum(point.part == "new_size" for point, _ in keys) >= 3  # as many as a fit needs
    text = file.read_text()
    profiler.profile(made, here, tmp_path, False, silent)
    assert file.read_text() == text  # nothing left to do
    model = fit_profile(read_profile(file), made.shape)
    assert {key[1:] for key in model.fits} >= {("layer", phase, b) for phase in ("prefill", "decode") for b in (4, 16)}


def test_a_profile_of_another_kernel_or_version_is_not_extended(folder, tmp_path):
    made, here = task(folder("llama"), seconds=0.0), cluster()
    old = replace(made, setup=replace(made.setup, libraries=made.setup.libraries | {"hqq": "0.1"}))
    profiler.profile(old, here, tmp_path, False, silent)
    with pytest.raises(UserError, match=r"measured with hqq 0\.1, but hqq .* force=true"):
        profiler.profile(made, here, tmp_path, False, silent)
    profiler.profile(made, here, tmp_path, True, silent)
    assert read_profile(tmp_path / "profile.csv").setup == made.setup


def test_each_type_is_profiled_once_and_only_here():
    here = cluster(DeviceConfig("core", 0), DeviceConfig("core", 1, cpu_share=0.5), DeviceConfig("core", 2))
    assert [device.type.name for device in profiler.list_local_types(here)] == ["core", "core_share50"]
    config = ClusterConfig(name="far")
    config.device_types = {"core": DeviceTypeConfig("cpu", 1 << 28, 2e10, {"float32": 1e11}, 1e-4)}
    config.hosts = [HostConfig("far-away.invalid", [DeviceConfig("core", 0)])]
    far = Cluster.from_config(config)
    with pytest.raises(UserError, match="none of the cluster's hosts"):
        profiler.list_local_types(far)


def test_an_undisturbed_timing_is_wall_time_and_a_disturbed_one_processor_time(monkeypatch):
    """A clock of our own: each action takes one second of processor, and two or one of wall time."""
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr("ds_llmpq.profiling.timer.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("ds_llmpq.profiling.timer.time.thread_time", lambda: clock["cpu"])

    def action(wall):
        clock["wall"] += wall
        clock["cpu"] += 1.0

    walls = iter([1.0, 2.0, 1.02, 1.0, 2.0, 5.0])
    timing = Timer(CPU).time(lambda: action(next(walls)), 5.0, warm_up=0)
    assert (timing.repeats, timing.undisturbed, timing.median_seconds) == (4, 3, 1.0)
    timing = Timer(CPU).time(lambda: action(4.0), 0.0, warm_up=0)
    assert (timing.undisturbed, timing.median_seconds) == (0, 1.0)
    timing = Timer(CPU, cpu_share=0.5).time(lambda: action(2.0), 0.0, warm_up=0)
    assert (timing.undisturbed, timing.median_seconds) == (3, 2.0)
    timing = Timer(CPU, threads=2).time(lambda: action(4.0), 0.0, warm_up=0)
    assert timing.median_seconds == 4.0


def test_a_gpu_is_timed_in_its_steady_state(monkeypatch):
    """Each action takes the host 0.1 ms and then the device 0.5, which work side by side."""
    clock = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = max(clock.values())

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def action():
        clock["host"] += 1e-4
        clock["device"] = max(clock.values()) + 5e-4

    monkeypatch.setattr("ds_llmpq.profiling.timer.time.perf_counter", lambda: clock["host"])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.update(host=max(clock.values())))
    timing = Timer(torch.device("cuda")).time(action, 0.1)
    assert timing.median_seconds == pytest.approx(5e-4, rel=0.01)


def test_the_processor_rests_before_each_repeat_and_that_is_not_counted(monkeypatch):
    clock, rests = {"now": 0.0}, []
    monkeypatch.setattr("ds_llmpq.profiling.timer.time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr("ds_llmpq.profiling.timer.time.thread_time", lambda: clock["now"])

    def rest(seconds):
        rests.append(seconds)
        clock["now"] += 100.0

    monkeypatch.setattr("ds_llmpq.profiling.timer.time.sleep", rest)
    timing = Timer(CPU, pause_seconds=0.5).time(lambda: clock.update(now=clock["now"] + 2.0), 0.0, warm_up=1)
    assert (rests, timing.median_seconds, timing.first_seconds) == ([0.5] * timing.repeats, 2.0, 2.0)


def test_a_share_stretches_layers_to_processor_time_over_share(monkeypatch):
    clock = {"wall": 0.0, "cpu": 0.0}

    def sleep(seconds):
        clock["wall"] += seconds + 1e-4  # sleeps overshoot

    class Layer(torch.nn.Module):
        def __init__(self, wall, cpu):
            super().__init__()
            self.wall, self.cpu = wall, cpu

        def forward(self):
            clock["wall"] += self.wall
            clock["cpu"] += self.cpu

    monkeypatch.setattr("ds_llmpq.engine.throttle.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("ds_llmpq.engine.throttle.time.thread_time", lambda: clock["cpu"])
    monkeypatch.setattr("ds_llmpq.engine.throttle.time.sleep", sleep)
    stage = torch.nn.Sequential(Layer(1e-3, 1e-3), Layer(1e-5, 1e-5), Layer(6e-3, 2e-3))
    CpuShare(0.25).attach(stage)
    for _ in range(100):
        for layer in stage:
            layer()
    # the third layer waited for its processor; of its 8 ms only 2 are left to sleep
    assert clock["wall"] == pytest.approx(100 * (4e-3 + 4e-5 + 8e-3), rel=0.01)


@pytest.mark.slow
def test_a_trial_pipeline_finds_overheads_and_links(folder, tmp_path):
    spec = {"kind": "cpu", "threads": 1, "links": True, "path": str(folder("llama")), "dtype": "float32"}
    found = run_trial(spec | {"sizes": [1, 2], "prompt_tokens": 8, "rounds": 1}, tmp_path / "log")
    seen = {(entry["part"], entry["phase"], entry["batch"]) for entry in found["passes"]}
    passes = {(p, f, b) for p in ("first", "middle", "last") for f in ("prefill", "decode") for b in (1, 2)}
    assert seen == passes | {("draw", "decode", 1), ("draw", "decode", 2)}
    assert all(0 <= entry["seconds"] < 10 for entry in found["passes"])
    assert {entry["channel"] for entry in found["links"]} == {"activation", "token"}
    assert all(min(entry["seconds"]) > 0 for entry in found["links"])
    with pytest.raises(UserError, match="trial pipeline failed"):
        run_trial(spec | {"path": str(tmp_path), "sizes": [1], "prompt_tokens": 8, "rounds": 1}, tmp_path / "log")
