"""Keys beside `plan=FILE`: those the plan decides are named, and the model is the plan's unless given."""

from dataclasses import replace

import pytest

from ds_llmpq import config
from ds_llmpq.errors import UserError
from ds_llmpq.quant.writer import write_quantized
from ds_llmpq.serving.batch_run import choose_model, find_checkpoint, find_ignored, note_ignored
from ds_llmpq.serving.planning import make_plan

QUICK = ["planner.solver=search", "planner.time_limit_seconds=1", "workload=demo", "cluster=local_cpu1"]


def settings_of(command, *arguments):
    return config.to_object(config.compose_settings(command, list(arguments)), config.COMMANDS[command])


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan")
    return make_plan(settings_of("plan", *QUICK), out)


def test_the_plans_own_values_and_defaults_are_not_named(plan):
    bits = str(list(plan.quant.bits))
    assert find_ignored(settings_of("run", "plan=p.json", f"quant.bits={bits}", "workload=demo"), plan) == []


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_other_values_are_named_in_one_line(plan, command, capsys):
    given = settings_of(command, "plan=p.json", "quant.group_size=128", "workload.sequences=3", "planner.theta=9")
    note_ignored(given, plan)
    said = capsys.readouterr().err
    assert said == (
        "note: p.json decides, and so these have no effect: quant.group_size, workload.sequences, planner.theta.\n"
    )


def test_what_a_second_plan_would_read_is_not_named(plan):
    given = settings_of("run", "plan=p.json", "planner.theta=9", "cost.kernel=fused", "run.on_loss=replan")
    assert find_ignored(given, plan) == []


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_the_model_is_the_plans_unless_it_is_given(plan, command, tmp_path):
    assert choose_model(settings_of(command)).model.path == config.asset("tiny-llama")
    beside = choose_model(settings_of(command, "plan=p.json"))
    assert beside.model.path is None
    assert str(find_checkpoint(beside, plan)) == plan.model.path
    with pytest.raises(UserError, match=str(tmp_path)):
        find_checkpoint(settings_of(command, "plan=p.json", f"model.path={tmp_path}"), plan)


@pytest.mark.parametrize("command", ["run", "evaluate"])
@pytest.mark.parametrize("key", ["quantized", "model.path"])
def test_a_checkpoint_that_was_quantized_for_another_plan_is_refused_before_anything_starts(
    plan, command, key, tmp_path
):
    bits, quant = [width for stage in plan.stages for width in stage.bits], replace(plan.quant, zeros="whole")
    bits[0] = 4
    write_quantized(plan.model.path, tmp_path, bits, quant.to_config())
    given = settings_of(command, "plan=p.json", f"{key}={tmp_path}")
    stage = plan.stages[0]

    def with_bits(first, **changes):
        return replace(plan, stages=(replace(stage, bits=(first, *stage.bits[1:])),), quant=replace(quant, **changes))

    assert find_checkpoint(given, with_bits(4)) == tmp_path
    with pytest.raises(UserError, match=r"Layer 0 is kept at 4 bits in .* but 8 are asked for; run `ds-llmpq quantize"):
        find_checkpoint(given, with_bits(8))
    for name, other, said in (("zeros", "real", "whole"), ("group_size", 32, "64"), ("lm_head_bits", 8, "16 bits")):
        with pytest.raises(UserError, match=rf"{said}.* but {other} (is|are) asked for"):
            find_checkpoint(given, with_bits(4, **{name: other}))
    unlike = replace(with_bits(4), model=replace(plan.model, fingerprint="0" * 64))
    with pytest.raises(UserError, match="made for a model with fingerprint 000000000000"):
        find_checkpoint(given, unlike)
