"""Every shipped device, cluster, model and workload composes through Hydra and is usable as it stands."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cluster.config import ClusterConfig
from ds_llmpq.cluster.detect import KNOWN_GPUS, detect, parse_gpus
from ds_llmpq.config import read_device_types, register
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner import solve
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig

CONF = Path(__file__).parents[2] / "conf"
PUBLISHED = {1: 1, 2: 1, 3: 4, 4: 4, 5: 6, 6: 4, 7: 8, 8: 6, 9: 4, 10: 4, 11: 4}  # cluster -> devices
PARAMETERS = {  # of the published models
    "opt_13b": 12.85e9,
    "opt_30b": 29.97e9,
    "opt_66b": 65.72e9,
    "bloom_176b": 176.25e9,
    "llama3_8b": 8.030e9,
    "llama3_70b": 70.55e9,
    "qwen2_5_14b": 14.77e9,
    "qwen2_5_32b": 32.76e9,
    "mixtral_8x7b": 46.70e9,
}


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def resolvers():
    register()


def load(group, name, schema):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        content = compose(overrides=[f"+{group}={name}"])[group]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))


@pytest.mark.parametrize("name", [name for name in names("cluster") if name != "auto"])
def test_clusters_are_valid(name):
    cluster = Cluster.from_config(load("cluster", name, ClusterConfig))
    assert cluster.name == name
    for device in cluster.devices:
        assert device.type.source.startswith(("datasheet: ", "measured: "))
        for other in cluster.devices:
            assert device == other or cluster.link(device.name, other.name).bandwidth_bytes_per_second > 1e8
    if name.startswith("cluster"):
        assert len(cluster.devices) == PUBLISHED[int(name.removeprefix("cluster"))]


def test_detection_knows_the_shipped_types():
    types = read_device_types()
    assert set(types) == set(names("device"))
    written = {name for _, _, name in KNOWN_GPUS if "\\" not in name}
    assert written <= set(types)
    assert {"cpu_core", "t4", "a10g", "rtx_a6000", "rtx_4090"} <= set(types) - written  # found by their own names
    planned_only = {name for name, kind in types.items() if "planned only" in kind.source}
    assert planned_only == {name for name in types if name.startswith("mi")}
    found = detect(types, gpus=parse_gpus("0, 00000000:01:00.0, NVIDIA L4, 23034, 22500, 8.9"))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), found))
    assert Cluster.from_config(config).devices[0].type.source == types["l4"].source


def test_all_published_clusters_are_shipped():
    assert {f"cluster{number}" for number in PUBLISHED} <= set(names("cluster"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_weightless_models_have_the_published_size(name):
    config = load("model", name, ModelConfig)
    assert config.path is None
    assert ModelShape.from_config(config.shape).parameters == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_every_shipped_model_is_listed_here():
    assert set(names("model")) == {*PARAMETERS, "tiny"}


@pytest.mark.parametrize(("name", "expected"), [("paper", (32, 512, 100)), ("paper_latency", (32, 128, 200))])
def test_published_workloads(name, expected):
    workload = load("workload", name, WorkloadConfig)
    assert (workload.sequences, workload.prompt_tokens, workload.generated_tokens) == expected


def test_the_demonstration_gains_by_planning():
    """What demo_cpu2 is for: 16 bits do not fit everywhere but on most layers, an even split at 4 bits alone."""
    shape = ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 2048,
            "max_position_embeddings": 1024,
        }
    )
    cluster = Cluster.from_config(load("cluster", "demo_cpu2", ClusterConfig))
    workload = load("workload", "demo", WorkloadConfig)
    problem = prepare(cluster, shape, workload, QuantConfig(), PlannerConfig(), dtype="bfloat16").problem
    memory, sizes = problem.memory, problem.micro_batches
    workspace = max(
        min(memory.workspace_bytes.prefill[size] for size in sizes.prefill),
        min(memory.workspace_bytes.decode[size] for size in sizes.decode),
    )
    kv = workload.sequences * memory.kv_bytes_per_sequence_layer

    def most_layers(device, bits, part):
        return int((device.memory_bytes - workspace - part) // (memory.layer_bytes[bits][0] + kv))

    first, second = problem.devices
    fits = {
        bits: (most_layers(first, bits, memory.embed_bytes), most_layers(second, bits, memory.head_bytes))
        for bits in problem.bits
    }
    assert sum(fits[16]) < 8 <= sum(fits[8])
    assert min(fits[8]) < 4 <= min(fits[4])
    plan = solve(problem)
    even, fastest = (plan.baselines[name] for name in ("uniform", "adabits"))
    assert 1.5 * plan.predicted.latency_seconds < even.latency_seconds
    assert plan.predicted.quality_loss < 0.2 * even.quality_loss
    assert 1.05 * plan.predicted.latency_seconds < fastest.latency_seconds
