"""A plan without the devices that were lost: the same widths where they fit, fewer sequences where they must."""

import pytest

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.serving.batch_run import choose_model
from ds_llmpq.serving.planning import make_plan
from ds_llmpq.serving.replan import plan_without, remove_devices


def planned(folder, *overrides):
    folder.mkdir(exist_ok=True)
    own = [
        "cluster=local_cpu2",
        "workload.sequences=32",
        "workload.prompt_tokens=32",
        "workload.generated_tokens=16",
        *overrides,
    ]
    settings = choose_model(config.to_object(config.compose_settings("run", own), config.COMMANDS["run"]))
    return settings, make_plan(settings, folder)


def widths(plan):
    return [width for stage in plan.stages for width in stage.bits]


def test_widths_stay_and_the_lost_device_goes(tmp_path):
    settings, plan = planned(tmp_path, "quant.bits=[4,8]", "planner.theta=0.01")
    assert len(plan.stages) == 2
    left = plan_without(settings, plan, ["localhost:1"], tmp_path, widths_free=False)
    assert [stage.device for stage in left.stages] == ["localhost:0"]
    assert widths(left) == widths(plan)
    assert left.workload == plan.workload


def test_a_plan_from_elsewhere_keeps_its_own_settings(tmp_path):
    """Given as plan=FILE: what the configuration says of HQQ is then only the default."""
    _, plan = planned(tmp_path / "first", "quant.bits=[4,8]", "quant.lm_head_bits=8", "quant.group_size=128")
    settings = config.to_object(config.compose_settings("run", ["cluster=local_cpu2"]), config.COMMANDS["run"])
    left = plan_without(settings, plan, ["localhost:1"], tmp_path, widths_free=True)
    assert left.quant == plan.quant
    assert left.quant.lm_head_bits == 8
    assert widths(left) == widths(plan)


def test_what_does_not_fit_takes_fewer_sequences(tmp_path):
    settings, plan = planned(tmp_path)
    parts = [stage.memory_bytes for stage in plan.stages]
    need = sum(part.weights + part.embed + part.head + 0.7 * part.kv for part in parts)
    for device in settings.cluster.hosts[0].devices:
        device.memory_bytes = int(need + max(part.workspace for part in parts))
    left = plan_without(settings, plan, ["localhost:1"], tmp_path, widths_free=False)
    assert left.workload.sequences < plan.workload.sequences
    assert widths(left) == widths(plan)


def test_a_cluster_that_is_not_the_plan_s_and_one_without_devices_are_refused(tmp_path):
    settings, plan = planned(tmp_path)
    with pytest.raises(UserError, match="No device of the cluster is left"):
        plan_without(settings, plan, ["localhost:0", "localhost:1"], tmp_path, True)
    assert len(plan.stages) == 2
    settings.cluster = remove_devices(settings.cluster, {"localhost:1"})
    with pytest.raises(UserError, match="has no localhost:1"):
        plan_without(settings, plan, ["localhost:0"], tmp_path, True)
