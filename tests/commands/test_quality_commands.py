"""`sensitivity`, `quantize` and their mistakes from the command line's configuration on."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ds_llmpq import config
from ds_llmpq.commands import plan as plan_command
from ds_llmpq.commands import quantize, sensitivity
from ds_llmpq.commands.config import QuantizeConfig, SensitivityConfig
from ds_llmpq.errors import UserError
from ds_llmpq.quant.recipe import read_recipe
from ds_llmpq.sensitivity.table import read_sensitivity
from scripts.make_checkpoint import make_checkpoint

SMALL = {"layers": 3, "hidden": 128, "heads": 4, "vocab": 2048, "max_positions": 64}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", seed=5, **SMALL)


def settings(command, kind, *overrides):
    return config.to_object(config.compose_settings(command, list(overrides)), kind)


def test_a_table_a_plan_with_it_and_its_checkpoint(path, tmp_path, capsys):
    """sensitivity -> plan -> quantize: the promise in the plan is the table's, the widths written are the plan's."""
    calibration = ["calibration.rows=2", "calibration.tokens=32"]
    chosen = settings("sensitivity", SensitivityConfig, f"model.path={path}", *calibration)
    assert sensitivity.run(chosen, tmp_path / "sensitivity") == 0
    made = read_sensitivity(tmp_path / "sensitivity" / "sensitivity.json")
    assert not list((tmp_path / "sensitivity").glob("progress*"))
    assert made.provenance == "fitted"
    bound = 0.5 * sum(row[made.bits.index(3)] for row in made.table)
    planned = settings(
        "plan",
        config.COMMANDS["plan"],
        "cluster=local_cpu2",
        f"model.path={path}",
        f"planner.sensitivity={tmp_path / 'sensitivity' / 'sensitivity.json'}",
        "planner.mode=max_quality_loss",
        f"planner.max_quality_loss={bound}",
        "quant.bits=[2,3,4,8]",
        "workload.prompt_tokens=16",
        "workload.generated_tokens=8",
        "workload.sequences=2",
    )
    (tmp_path / "plan").mkdir()
    plan = plan_command.make_plan(planned, tmp_path / "plan")
    bits = [width for stage in plan.stages for width in stage.bits]
    promised = sum(row[made.bits.index(width)] for row, width in zip(made.table, bits, strict=True))
    assert plan.predicted.quality_loss == pytest.approx(promised)
    assert plan.predicted.quality_loss <= bound
    assert plan.provenance["sensitivity"] == "fitted (variance)"
    written = settings("quantize", QuantizeConfig, f"plan={tmp_path / 'plan' / 'plan.json'}")
    assert quantize.run(written, tmp_path / "quantized") == 0
    assert list(read_recipe(tmp_path / "quantized").bits) == bits
    assert "0 of them reused" in capsys.readouterr().out
    assert quantize.run(written, tmp_path / "quantized") == 0
    assert "5 parts, 5 of them reused" in capsys.readouterr().out


def test_sensitivities_of_another_model_are_refused(path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(path, other)
    record = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(record | {"rope_theta": 5.0}))
    calibration = ["calibration.rows=1", "calibration.tokens=16", "method=random"]
    chosen = settings("sensitivity", SensitivityConfig, f"model.path={other}", *calibration)
    sensitivity.run(chosen, tmp_path / "sensitivity")
    planned = settings(
        "plan", config.COMMANDS["plan"], "cluster=local_cpu2", f"model.path={path}",
        f"planner.sensitivity={tmp_path / 'sensitivity' / 'sensitivity.json'}",
        "workload.prompt_tokens=16", "workload.generated_tokens=8",
    )  # fmt: skip
    (tmp_path / "plan").mkdir()
    with pytest.raises(UserError, match="sensitivity is for the model with fingerprint"):
        plan_command.make_plan(planned, tmp_path / "plan")


def test_one_width_for_all_layers(path, tmp_path):
    chosen = settings("quantize", QuantizeConfig, f"model.path={path}", "widths=[3]")
    assert quantize.run(chosen, tmp_path / "q") == 0
    assert read_recipe(tmp_path / "q").bits == (3, 3, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "either plan=FILE or widths"),
        (["widths=[4,4]"], "2 widths are given for the 3 layers"),
        (["plan=none.json"], "cannot be read"),
    ],
)
def test_quantize_mistakes(path, tmp_path, overrides, words):
    chosen = settings("quantize", QuantizeConfig, f"model.path={path}", *overrides)
    with pytest.raises(UserError, match=words):
        quantize.run(chosen, tmp_path / "q")
