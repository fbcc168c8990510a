"""Reading `problem.json`: round trips, and one sentence for each mistake."""

import copy
import math

import pytest
from random_problems import random_problem

from ds_llmpq.errors import UserError
from ds_llmpq.planner import Problem


@pytest.mark.parametrize("seed", range(20))
def test_round_trip(seed):
    problem = Problem.from_json(random_problem(seed))
    assert Problem.from_json(problem.to_json()) == problem


def test_the_former_word_for_sensitivity_is_read_and_the_present_one_named(capsys):
    obj = random_problem(4)
    expected = Problem.from_json(obj)
    assert capsys.readouterr().err == ""
    former = {"omega" if key == "sensitivity" else key: value for key, value in obj.items()}
    assert Problem.from_json(former) == expected
    assert capsys.readouterr().err.count("problem.omega is now called sensitivity") == 1
    with pytest.raises(UserError, match="unknown key 'omega'"):
        Problem.from_json({**obj, "omega": obj["sensitivity"]})


def test_null_and_infinite_latencies_are_absent():
    obj = random_problem(3)
    name = next(iter(obj["device_types"]))
    bits, size = str(obj["bits"][0]), str(obj["micro_batches"]["prefill"][0])
    for value in (None, math.inf):
        obj["device_types"][name]["prefill_layer_seconds"][bits][size] = value
        table = Problem.from_json(obj).device_types[name].prefill_layer_seconds
        assert int(size) not in table[int(bits)]


def _set(obj, path, value):
    *parents, key = path
    for parent in parents:
        obj = obj[parent]
    if value is KeyError:
        del obj[key]
    else:
        obj[key] = value


MISTAKES = [
    (("schema",), 2, "problem.schema is 2"),
    (("extra",), 1, "unknown key 'extra'"),
    (("layers",), 0, "problem.layers is 0"),
    (("layers",), True, "problem.layers is True"),
    (("layers",), 2.5, "problem.layers is 2.5"),
    (("bits",), [], "problem.bits is [], but must have at least 1 item"),
    (("bits",), [4, 4], "problem.bits is [4, 4], but must list each value once"),
    (("workload", "sequences"), 0, "problem.workload.sequences is 0"),
    (("workload", "extra"), 0, "problem.workload has the unknown key"),
    (("workload", "prompt_tokens"), KeyError, "lacks the key 'prompt_tokens'"),
    (("micro_batches", "decode"), [], "problem.micro_batches.decode"),
    (("device_types",), {}, "problem.device_types is {}"),
    (("devices",), [], "problem.devices is [], but must have at least 1 item"),
    (("devices", 0, "type"), "nothing", "problem.devices[0].type is 'nothing'"),
    (("devices", 0, "memory_bytes"), -1, "problem.devices[0].memory_bytes is -1"),
    (("devices", 0, "memory_bytes"), math.inf, "problem.devices[0].memory_bytes is inf"),
    (("device_order",), "sorted", "problem.device_order is 'sorted'"),
    (("memory", "kv_bytes_per_sequence_layer"), math.nan, "kv_bytes_per_sequence_layer is nan"),
    (("memory", "tied_head"), 1, "problem.memory.tied_head is 1"),
    (("memory", "layer_bytes", "99"), 1, "unknown key '99'"),
    (("memory", "layer_bytes", "+4"), 1, "has the key '+4', but must be a whole number in plain digits"),
    (("memory", "workspace_bytes", "decode", "01"), 1, "has the key '01'"),
    (("memory", "layer_bytes"), {"4": [1]}, "problem.memory.layer_bytes"),
    (("links", "default", "latency_seconds"), -0.1, "problem.links.default.latency_seconds is -0.1"),
    (("sensitivity",), [], "problem.sensitivity has 0 entries"),
    (("sensitivity", 0, 0), -1, "problem.sensitivity[0][0] is -1"),
    (("objective",), {"mode": "best"}, "problem.objective.mode is 'best'"),
    (("objective",), {"mode": "theta"}, "problem.objective lacks the key 'theta'"),
    (("objective",), {"mode": "theta", "theta": 1, "limit": 2}, "unknown key 'limit'"),
    (("objective",), 3, "problem.objective is 3, but must be an object"),
    (("schema",), True, "problem.schema is True"),
    (("schema",), KeyError, "problem lacks the key 'schema'"),
    (("sensitivity", 0, 0), math.inf, "problem.sensitivity[0][0] is inf, but must be a finite number"),
    (("sensitivity", 0, 0), {1, 2}, "problem cannot be read (TypeError)"),
    (("devices", 0, "name"), "a\x1b[2J", "no control characters"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_named(path, value, sentence):
    obj = copy.deepcopy(random_problem(5))
    _set(obj, path, value)
    with pytest.raises(UserError) as caught:
        Problem.from_json(obj)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("obj", [None, 3, "problem", [], {}])
def test_not_a_problem_at_all(obj):
    with pytest.raises(UserError, match="problem"):
        Problem.from_json(obj)


def test_links_name_known_devices_once():
    obj = random_problem(5)
    name = obj["devices"][0]["name"]
    pair = {"from": name, "to": "elsewhere", "latency_seconds": 0.0, "seconds_per_byte": 0.0}
    with pytest.raises(UserError, match="no device has that name"):
        Problem.from_json({**obj, "links": {**obj["links"], "pairs": [pair]}})
    pair = {**pair, "to": name}
    with pytest.raises(UserError, match="repeats the link"):
        Problem.from_json({**obj, "links": {**obj["links"], "pairs": [pair, pair]}})
