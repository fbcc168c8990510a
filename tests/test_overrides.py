"""Keys of the command line: none without effect, paths and free dictionaries as they are written."""

import pytest

from ds_llmpq import config, overrides
from ds_llmpq.errors import UserError
from ds_llmpq.serving.config import PlanConfig


def plan(*arguments):
    return config.to_object(config.compose_settings("plan", list(arguments)), PlanConfig)


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("planner.tehta", "planner.theta"),
        ("workload.sequence", "workload.sequences"),
        ("theta", "planner.theta"),
        ("planer.theta", "planner.theta"),
        ("cluster_fil", "cluster_file"),
        ("planner.micro_batches.prefil", "planner.micro_batches.prefill"),
        ("hydra.run.dri", "hydra.run.dir"),
    ],
)
def test_an_unknown_key_is_refused_and_the_known_one_named(prefix, key, near):
    value = "" if prefix == "~" else "=3"
    with pytest.raises(UserError, match=rf"^{key} is no key of `ds-llmpq plan`; did you mean {near}\?$"):
        config.compose_settings("plan", [f"{prefix}{key}{value}"])


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_no_command_takes_a_key_it_does_not_have(command):
    for argument in ("+nonsense=1", "++nonsense.deep=1", "+hydra.nonsense=1", "nonsense"):
        with pytest.raises(UserError, match="nonsense"):
            config.compose_settings(command, [argument])


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_every_key_of_a_command_is_known_to_it(command):
    keys = overrides.list_keys(config.COMMANDS[command])
    assert {"out", "output"} & set(keys)
    arguments = [f"{key}=null" for key in keys]
    assert len(config.prepare(command, arguments)) == len(arguments)


def test_a_plus_before_a_known_key_sets_it():
    assert plan("+planner.theta=7").planner.theta == 7
    assert plan("++planner.theta=7").planner.theta == 7


PINNED = {"layers": {"my-host.domain:0": [0, 4], "localhost:1": [4, 8]}, "order": ["my-host.domain:0", "localhost:1"]}


@pytest.mark.parametrize(
    ("arguments", "pins"),
    [
        (["planner.pins={micro_batch: {decode: 8}}"], {"micro_batch": {"decode": 8}}),
        (["+planner.pins={micro_batch: {decode: 8}}"], {"micro_batch": {"decode": 8}}),
        (["planner.pins.micro_batch.decode=8"], {"micro_batch": {"decode": 8}}),
        (["planner.pins={bits: {0: 4, 1: 8}}"], {"bits": {0: 4, 1: 8}}),
        (["planner.pins.bits={0: 4}", "planner.pins.order=[a:0]"], {"bits": {0: 4}, "order": ["a:0"]}),
        (
            ["planner.pins={layers: {my-host.domain:0: [0, 4], localhost:1: [4, 8]}, "
             "order: [my-host.domain:0, localhost:1]}"],
            PINNED,
        ),
        (["planner.pins.layers.my-host.domain:0=[0,4]"], {"layers": {"my-host.domain:0": [0, 4]}}),
        (["planner.pins.layers={localhost:1: [4, 8]}"], {"layers": {"localhost:1": [4, 8]}}),
    ],
)  # fmt: skip
def test_pins_are_taken_as_they_are_documented(arguments, pins):
    assert plan(*arguments).planner.pins == pins


@pytest.mark.parametrize("folder", ["hydra.run.dir", "hydra.sweep.dir"])
def test_the_folder_is_named_once(folder):
    with pytest.raises(UserError, match=f"{folder} and out both name the folder"):
        config.prepare("plan", [f"{folder}=here", "out=there"])


@pytest.mark.parametrize(
    "path",
    [
        "~/x.jsonl",
        *["a b", "a,b", "a+b", "a@b", "a%b", "(x)", "{x}", "[x]", "x=y", "007", "1e3", "true", "#x", "$x", "*?"],
    ],
)
def test_a_path_stays_as_it_is_written(path):
    assert plan(f"input={path}", f"model.path={path}").input == path


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.make_absolute(plan("input=~/x.jsonl").input) == tmp_path / "x.jsonl"


def test_points_of_a_sweep_over_paths_stay_points():
    assert config.prepare("plan", ["problem=a.json,b.json"], sweep=True) == ["problem=a.json,b.json"]
    assert config.prepare("plan", ["problem=~/a.json"], sweep=True) == ["problem='~/a.json'"]
    assert config.prepare("plan", ["problem=a.json,b.json"]) == ["problem='a.json,b.json'"]


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("planner.seed_of=7", "planner.seed=7"),
        ("++planner.seed_of=7", "++planner.seed=7"),
        ("~planner.seed_of", "~planner.seed"),
        ("pinned.order=[a]", "planner.pins.order=[a]"),
    ],
)
def test_a_former_key_is_taken_and_the_present_one_named(monkeypatch, capsys, former, present):
    monkeypatch.setattr(overrides, "FORMER_KEYS", {"planner.seed_of": "planner.seed", "pinned": "planner.pins"})
    assert overrides.rename_former(former) == present
    assert f"is now called {present.lstrip('+~').partition('=')[0]}" in capsys.readouterr().err


def test_a_former_key_sets_the_present_one_with_one_line(capsys):
    assert plan("planner.omega=a=b.json").planner.sensitivity == "a=b.json"
    assert capsys.readouterr().err.count("planner.sensitivity") == 1
    assert plan("planner.theta=7").planner.theta == 7
    assert capsys.readouterr().err == ""


def test_a_former_entry_of_a_group_is_taken_and_the_present_one_named(capsys):
    assert plan("cluster=local_unlike2").cluster.name == "local_heterogeneous2"
    assert capsys.readouterr().err.count("local_unlike2 is now called local_heterogeneous2") == 1
    swept = config.prepare("plan", ["cluster=local_unlike3,local_cpu2"], sweep=True)
    assert swept == ["cluster=local_heterogeneous3,local_cpu2"]


def test_every_former_entry_names_a_present_one():
    for (group, former), present in overrides.FORMER_ENTRIES.items():
        assert (config.conf_folder() / group / f"{present}.yaml").is_file()
        assert not (config.conf_folder() / group / f"{former}.yaml").exists()


def test_every_former_key_names_a_present_one():
    known = {key for kind in config.COMMANDS.values() for key in overrides.list_keys(kind)}
    assert set(overrides.FORMER_KEYS.values()) <= known
    assert not set(overrides.FORMER_KEYS) & known


def test_the_value_of_a_flag_is_no_override():
    arguments = ["--cfg", "job", "planner.theta=2"]
    assert overrides.prepare("plan", config.COMMANDS["plan"], arguments, config.conf_folder()) == arguments
