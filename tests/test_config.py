"""Every shipped configuration composes into its dataclass, and mistakes are said in one sentence."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ds_llmpq import config, overrides
from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.cluster.config import ClusterConfig, DeviceTypeConfig
from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.errors import UserError
from ds_llmpq.lengths.config import LengthDataConfig, LengthTaskConfig, ProxyConfig
from ds_llmpq.models.config import ModelConfig
from ds_llmpq.planner.config import PlannerConfig, WorkloadConfig
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.research.config import ArrivalsConfig, PredictionConfig
from ds_llmpq.serving.config import PlanConfig

GROUPS = {
    "model": ModelConfig,
    "cluster": ClusterConfig,
    "device": DeviceTypeConfig,
    "workload": WorkloadConfig,
    "quant": QuantConfig,
    "planner": PlannerConfig,
    "engine": EngineConfig,
    "batch": BatchConfig,
    "arrivals": ArrivalsConfig,
    "prediction": PredictionConfig,
    "lengths": LengthDataConfig,
    "task": LengthTaskConfig,
    "proxy": ProxyConfig,
}
WHOLE = {"experiment": "plan", "comparison": "simulate"}  # groups of whole configurations, and the command they are of
OTHERS = {"hydra", "cost"}  # settings of hydra's own


def entries(*groups):
    return [(group, file.stem) for group in groups for file in sorted((config.conf_folder() / group).glob("*.yaml"))]


ENTRIES = entries(*GROUPS)


def test_every_folder_of_configurations_is_tested_here():
    folders = {folder.name for folder in config.conf_folder().iterdir() if folder.is_dir()}
    assert folders - OTHERS == set(GROUPS) | set(WHOLE)


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_a_command_composes(command):
    kind = config.COMMANDS[command]
    assert isinstance(config.to_object(config.compose_settings(command, []), kind), kind)


@pytest.fixture
def conf():
    config.register()
    with initialize_config_dir(str(config.conf_folder()), version_base="1.3"):
        yield


@pytest.mark.parametrize(("group", "entry"), ENTRIES)
def test_a_group_entry_composes(conf, group, entry):
    content = compose(overrides=[f"+{group}={entry}"])[group]
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GROUPS[group]), content))
    assert isinstance(settings, GROUPS[group])


@pytest.mark.parametrize(("group", "entry"), entries(*WHOLE))
def test_an_experiment_composes_with_the_ends_of_what_it_sweeps(group, entry):
    text = (config.conf_folder() / group / f"{entry}.yaml").read_text()
    named = re.search(r"^# CommandConfig: (\w+)$", text, re.MULTILINE)
    command = named[1] if named else WHOLE[group]
    swept = OmegaConf.select(OmegaConf.create(text), "hydra.sweeper.params") or {}
    for end in (0, -1) if swept else (0,):
        chosen = []
        for key, values in swept.items():
            override = OverridesParser.create().parse_override(f"{key}={values}")
            assert override.is_sweep_override(), f"{key} takes one value only"
            chosen.append(f"{key}={list(override.sweep_string_iterator())[end]}")
        made = config.compose_settings(command, [f"{'+' * (group == 'experiment')}{group}={entry}", *chosen])
        assert isinstance(config.to_object(made, config.COMMANDS[command]), config.COMMANDS[command])


def test_a_cluster_and_an_ablation_go_together():
    made = config.to_object(
        config.compose_settings("plan", ["cluster=cluster9", "+experiment=[paper,grouping]"]), PlanConfig
    )
    assert (made.cluster.name, made.ablation.variant) == ("cluster9", "grouped")
    assert made.model.shape["num_hidden_layers"] == 48


def test_a_cluster_without_a_published_model_is_one_sentence():
    with pytest.raises(config.UserError, match=r"cluster=demo_cpu2 was not published .*; give model=NAME too\.$"):
        config.compose_settings("plan", ["+experiment=paper", "cluster=demo_cpu2"])
    assert (
        config.compose_settings("plan", ["+experiment=paper", "cluster=demo_cpu2", "model=tiny"]).cluster.name
        == "demo_cpu2"
    )


def test_the_papers_clusters_are_all_there():
    assert {f"cluster{number}" for number in range(1, 12)} <= {entry for group, entry in ENTRIES if group == "cluster"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("foo=1", "foo is no key of `ds-llmpq plan`"),
        ("planner.thetaa=1", "thetaa"),
        ("planner.theta=abc", "could not be converted to Float"),
        ("quant.bits=4", "quant.bits=4 must be a list, as quant.bits=[4]."),
        ("cluster=nope", "cluster/nope"),
        ("workload.sequences=many", "could not be converted to Integer"),
        ("quant.bits=4", "quant"),
        ("=", "'=' is no key=value"),
        ("[" * 3000 + "=1", "is no key of `ds-llmpq plan`"),
    ],
)
def test_a_wrong_override_is_one_line(override, said):
    with pytest.raises(UserError) as caught:
        config.compose_settings("plan", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_group_entry_names_those_that_exist():
    with pytest.raises(UserError, match=r"Available in 'cluster' are auto, cluster1, .*local_cpu2"):
        config.compose_settings("plan", ["cluster=nope"])


@pytest.mark.parametrize("path", ["/a/b.json", "a=1,b=[2]/p.json", "with space/x", "it's/x", "back\\slash", "é/x"])
def test_a_path_survives_the_command_line(path):
    settings = config.to_object(config.compose_settings("plan", [f"problem={path}"]), config.COMMANDS["plan"])
    assert settings.problem == path


def test_what_is_quoted_already_stays():
    assert overrides.quote_path("problem='a=b'", PlanConfig) == "problem='a=b'"
    assert overrides.quote_path("planner.theta=1,2", PlanConfig) == "planner.theta=1,2"


def test_sizes_and_assets_resolve(tmp_path):
    settings = config.to_object(config.compose_settings("plan", ["cluster=demo_cpu2"]), config.COMMANDS["plan"])
    assert all(device.memory_bytes % 2**20 == 0 for device in settings.cluster.hosts[0].devices)
    assert Path(config.asset("demo_prompts.jsonl")).is_file()
    with pytest.raises(UserError, match="asset:nothing"):
        config.asset("nothing")


def test_a_cluster_file_takes_the_groups_place(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: mine\nhosts:\n- {name: a, devices: [{type: t4}]}\n")
    settings = config.to_object(config.compose_settings("plan", [f"cluster_file={file}"]), config.COMMANDS["plan"])
    assert config.choose_cluster(settings).name == "mine"
    file.write_text("name: mine\nhosst: []\n")
    with pytest.raises(UserError, match="hosst"):
        config.choose_cluster(settings)
    file.write_text("name: [")
    with pytest.raises(UserError, match="cannot be read"):
        config.choose_cluster(settings)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        config.choose_cluster(settings)


def test_variables_of_the_command_line_go_with_a_cluster_file(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: mine\nenv: {NCCL_DEBUG: INFO}\n")
    composed = config.compose_settings("plan", [f"cluster_file={file}", "+cluster.env.OWN=1"])
    loaded = config.load_cluster(config.to_object(composed, PlanConfig))
    assert loaded.cluster.name == "mine"
    assert loaded.cluster.env == {"NCCL_DEBUG": "INFO", "OWN": "1"}
    assert loaded.cluster_file is None


CLUSTERS = sorted((config.conf_folder() / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("shipped", CLUSTERS, ids=lambda file: file.stem)
def test_a_copy_of_a_shipped_cluster_is_a_cluster_file(shipped, tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text(shipped.read_text())
    given = config.to_object(config.compose_settings("plan", [f"cluster_file={copy}"]), PlanConfig)
    chosen = config.to_object(config.compose_settings("plan", [f"cluster={shipped.stem}"]), PlanConfig)
    assert config.choose_cluster(given) == chosen.cluster


def cluster_from(tmp_path, text):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return config.choose_cluster(
        config.to_object(config.compose_settings("plan", [f"cluster_file={file}"]), PlanConfig)
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("links: {intra_host: {bandwith_bytes_per_second: 1e9}}", "did you mean bandwidth_bytes_per_second?"),
        ("hosts: [{name: a, devices: [{type: cpu_core, slot: 0, memory_bytes: 14GiB}]}]", "give a number of bytes"),
    ],
)
def test_what_is_wrong_in_a_cluster_file_is_said_in_its_own_words(tmp_path, entry, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        cluster_from(tmp_path, f"name: mine\n{entry}\n")
    assert "Config'" not in str(error.value), "names of our classes are of no use"


def test_a_cluster_file_may_name_shipped_types(tmp_path):
    file = tmp_path / "cluster.yaml"
    devices = "[{type: t4, slot: 0}, {type: own, slot: 1}, {type: l4, slot: 2}, {type: nothing, slot: 3}]"
    file.write_text(f"""
name: mine
device_types:
  own: {{kind: cpu}}
  l4: {{memory_bytes: 7}}
hosts:
  - {{name: one, devices: {devices}}}
""")
    types = config.read_cluster(file).device_types
    assert set(types) == {"own", "l4", "t4"}
    assert types["t4"] == config.read_device_types()["t4"]
    assert types["l4"].memory_bytes == 7


def test_keys_of_a_cluster_file_go_over_its_defaults(tmp_path):
    defaults = "defaults: [/device@device_types.mine: t4, _self_]\nname: x\n"
    found = cluster_from(
        tmp_path, defaults + "device_types: {mine: {memory_bytes: 24e9}, other: {memory_bytes: 8.0}}\n"
    )
    assert found.device_types["mine"].memory_bytes == 24_000_000_000
    assert found.device_types["mine"].compute_capability == "7.5"
    assert found.device_types["other"].memory_bytes == 8
    with pytest.raises(UserError, match=r"device_types\.mine\.memory_bytes: Value '24\.5'"):
        cluster_from(tmp_path, defaults + "device_types: {mine: {memory_bytes: 24.5}}\n")


@pytest.mark.parametrize("entry", ["/device@device_types.t4: ../t4", "/device@device_types.t4: t5", "/cluster: x", "3"])
def test_defaults_of_a_cluster_file_are_device_types_alone(tmp_path, entry):
    with pytest.raises(UserError, match=r"defaults holds .* with a TYPE of a10, .*v100"):
        cluster_from(tmp_path, f"defaults: [{{{entry}}}]\n" if ":" in entry else f"defaults: [{entry}]\n")


def test_a_long_point_has_a_short_folder():
    def folder(name):
        return OmegaConf.create({"hydra": {"job": {"override_dirname": name}}, "at": "${point_folder:}"}).at

    config.register()
    assert folder("planner.theta=1") == "planner.theta=1"
    long = ",".join(f"planner.key{number}=1" for number in range(13))
    assert len(folder(long).encode()) <= 120
    assert folder(long).startswith("planner.key0=1,")
    assert folder(long) != folder(long + "0")
    assert folder("é" * 300).encode()
    assert "/" not in folder("model.path=a/b")
    assert folder("x=a/b") != folder("x=a_b")
