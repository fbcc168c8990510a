"""Every shipped configuration composes into its dataclass, and mistakes are said in one sentence."""

from pathlib import Path

import pytest

from ds_llmpq import config
from ds_llmpq.errors import UserError

GROUPS = {"plan": ["model", "cluster", "workload", "quant", "planner", "engine", "batch"]}
ENTRIES = [
    (group, file.stem) for group in GROUPS["plan"] for file in sorted((config.conf_folder() / group).glob("*.yaml"))
]


@pytest.mark.parametrize("verb", sorted(config.VERBS))
def test_a_verb_composes(verb):
    assert isinstance(config.to_object(config.composed(verb, []), config.VERBS[verb]), config.VERBS[verb])


@pytest.mark.parametrize(("group", "entry"), ENTRIES)
def test_a_group_entry_composes(group, entry):
    settings = config.to_object(config.composed("plan", [f"{group}={entry}"]), config.VERBS["plan"])
    assert getattr(settings, group) is not None


@pytest.mark.parametrize("experiment", [file.stem for file in (config.conf_folder() / "experiment").glob("*.yaml")])
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_an_experiment_composes(verb, experiment):
    config.to_object(config.composed(verb, [f"+experiment={experiment}"]), config.VERBS[verb])


def test_the_papers_clusters_are_all_there():
    assert {f"cluster{number}" for number in range(1, 12)} <= {entry for group, entry in ENTRIES if group == "cluster"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("foo=1", "Key 'foo' not in 'PlanVerb'"),
        ("planner.thetaa=1", "thetaa"),
        ("planner.theta=abc", "could not be converted to Float"),
        ("cluster=nope", "cluster/nope"),
        ("workload.sequences=many", "could not be converted to Integer"),
        ("quant.bits=4", "quant"),
        ("=", "No match in the defaults list"),
    ],
)
def test_a_wrong_override_is_one_line(override, said):
    with pytest.raises(UserError) as caught:
        config.composed("plan", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_group_entry_names_those_that_exist():
    with pytest.raises(UserError, match=r"Available in 'cluster' are cluster1, .*local_cpu2"):
        config.composed("plan", ["cluster=nope"])


@pytest.mark.parametrize("path", ["/a/b.json", "a=1,b=[2]/p.json", "with space/x", "it's/x", "back\\slash", "é/x"])
def test_a_path_survives_the_command_line(path):
    settings = config.to_object(config.composed("plan", [f"problem={path}"]), config.VERBS["plan"])
    assert settings.problem == path


def test_what_is_quoted_already_stays():
    assert config.quoted("problem='a=b'") == "problem='a=b'"
    assert config.quoted("planner.theta=1,2") == "planner.theta=1,2"


def test_sizes_and_assets_resolve(tmp_path):
    settings = config.to_object(config.composed("plan", ["cluster=demo_cpu2"]), config.VERBS["plan"])
    assert all(device.memory_bytes % 2**20 == 0 for device in settings.cluster.hosts[0].devices)
    assert Path(config.asset("demo_prompts.jsonl")).is_file()
    with pytest.raises(UserError, match="asset:nothing"):
        config.asset("nothing")


def test_a_cluster_file_takes_the_groups_place(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: mine\nhosts:\n- {name: a, devices: [{type: t4}]}\n")
    settings = config.to_object(config.composed("plan", [f"cluster_file={file}"]), config.VERBS["plan"])
    assert config.cluster_of(settings).name == "mine"
    file.write_text("name: mine\nhosst: []\n")
    with pytest.raises(UserError, match="hosst"):
        config.cluster_of(settings)
    file.write_text("name: [")
    with pytest.raises(UserError, match="cannot be read"):
        config.cluster_of(settings)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        config.cluster_of(settings)
