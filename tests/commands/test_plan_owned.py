"""Keys beside `plan=FILE`: those the plan decides are named, and the model is the plan's unless given."""

import pytest

from ds_llmpq import config
from ds_llmpq.errors import UserError
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
