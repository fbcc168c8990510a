"""`ds-llmpq plan` as a user calls it, in this process: artefacts, tables, exit codes."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import hydra
import pytest

from ds_llmpq import cli, config
from ds_llmpq.plan import Plan, launch_order, read_plan
from ds_llmpq.report import sweep
from ds_llmpq.sensitivity.prior import make_prior

SHAPE = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def small(tmp_path):
    """Overrides for a small model, of which planning needs nothing but config.json."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    return ["cluster=demo_cpu2", "workload=demo", f"model.path={model}"]


def test_plan_writes_its_artefacts_and_a_table(call, small, tmp_path):
    code, out, err = call("plan", *small, f"out={tmp_path}")
    assert (code, err) == (0, "")
    plan = read_plan(tmp_path / "plan.json")
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.stages[0].layers[0] == 0
    assert plan.stages[-1].layers[1] == 8
    assert len(plan.stages) == 2, "the second device is too small to be left with nothing, the first for everything"
    assert {stage.host for stage in plan.stages} == {"localhost"}
    assert sorted(stage.rank for stage in plan.stages) == [0, 1]
    assert launch_order(plan) == [("localhost", 0), ("localhost", 1)]
    assert (tmp_path / "hostfile").read_text() == "localhost slots=2\n"
    assert plan.provenance["sensitivity"].startswith("assumed")
    for text in ("localhost:0", "localhost:1", "predicted:", "solver:", "plan.json", "by hand:"):
        assert text in out


def test_a_plan_of_mixed_widths_notes_per_channel_and_counts_them(call, small, tmp_path):
    pins = "+planner.pins.bits={0:4,1:8,2:8,3:4}"
    held = {}
    for name, widths in (("groups", "[]"), ("rows", "[8]")):
        out = tmp_path / name
        code, _, err = call("plan", *small, "quant.bits=[4,8]", f"quant.per_channel_bits={widths}", pins, f"out={out}")
        assert (code, err) == (0, "")
        plan = read_plan(out / "plan.json")
        bits = [width for stage in plan.stages for width in stage.bits]
        assert bits[:4] == [4, 8, 8, 4]
        assert list(plan.quant.per_channel_bits) == json.loads(widths)
        held[name] = json.loads((out / "problem.json").read_text())["memory"]["layer_bytes"]
    assert held["rows"]["8"] < held["groups"]["8"]
    assert held["rows"]["4"] == held["groups"]["4"]


def test_a_low_bit_lm_head_is_in_plan_table_and_memory(call, small, tmp_path):
    held, prior = {}, make_prior(8, [4])
    for bits in (16, 4):
        code, out, err = call(
            "plan", *small, "quant.bits=[4]", f"quant.lm_head_bits={bits}", f"out={tmp_path / str(bits)}"
        )
        assert (code, err) == (0, "")
        plan = read_plan(tmp_path / str(bits) / "plan.json")
        assert plan.quant.lm_head_bits == bits
        assert (f"head {bits}" in out) is (bits < 16)
        lost = sum(row[0] for row in prior.table) + prior.head_loss(bits)
        assert plan.predicted.quality_loss == pytest.approx(lost)
        held[bits] = plan.stages[-1].memory_bytes.head
    assert held[4] < held[16] / 3


def test_the_problem_it_wrote_solves_again_without_a_model(call, small, tmp_path):
    call("plan", *small, f"out={tmp_path / 'a'}")
    code, _, _ = call("plan", f"problem={tmp_path / 'a' / 'problem.json'}", f"out={tmp_path / 'b'}")
    first, second = read_plan(tmp_path / "a" / "plan.json"), read_plan(tmp_path / "b" / "plan.json")
    assert code == 0
    assert second.model is None
    assert second.solver.objective == pytest.approx(first.solver.objective, rel=0.011)


def test_an_input_that_cannot_be_measured_is_named(call, tmp_path):
    (rows := tmp_path / "rows.jsonl").write_text(
        json.dumps({"custom_id": "a", "url": "/v1/completions", "method": "POST", "body": {"prompt": "Hello"}})
    )
    code, _, err = call("plan", "cluster=cluster1", "model=opt_13b", f"input={rows}", f"out={tmp_path / 'out'}")
    assert code == 0
    assert "a shape without a tokenizer; planning for 32 sequences of 512 + 100 tokens" in err


def test_an_infeasible_cluster_exits_with_two(call, small, tmp_path):
    code, _, err = call("plan", *small, "workload.sequences=512", f"out={tmp_path}")
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "localhost" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.path=/nowhere"], "/nowhere"),
        (["problem=/nowhere.json"], "/nowhere.json"),
        (["foo=1"], "foo"),
        (["planner.mode=best"], "best"),
        (["quant.bits=[5]"], "[5]"),
        (["quant.bits=[4]", "quant.group_size=7"], "7"),
        (["quant.lm_head_bits=7"], "quant.lm_head_bits=7; it must be one of"),
        (["quant.lm_head_bits=7", "planner.profile=/nowhere"], "quant.lm_head_bits=7; it must be one of"),
        (["quant.lm_head_bits=1"], "no device type of the cluster has that bit width"),
        (["quant.per_channel_bits=[16]"], "quant.per_channel_bits=[16]: list each width once"),
        (["quant.per_channel_bits=[8]", "quant.axis=0"], "set quant.axis=1, or quant.per_channel_bits=[]"),
        (["planner.sensitivity=/nowhere.json"], "/nowhere.json"),
        (["workload.prompt_tokens=4000"], "4064"),
        (["planner.solver=magic"], "magic"),
        (["engine.dtype=int3"], "int3"),
    ],
)
def test_a_mistake_is_one_sentence(call, small, tmp_path, arguments, said):
    code, _, err = call("plan", *small, *arguments, f"out={tmp_path}")
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_unknown_command_and_the_usage(call):
    code, _, err = call("fly")
    assert code == 1
    assert "fly" in err
    code, out, _ = call("--help")
    assert code == 0
    assert "ds-llmpq COMMAND" in out


def test_every_command_has_a_help(call):
    for command in (*config.COMMANDS, "completion"):
        code, out, err = call(command, "--help")
        assert (code, err) == (0, ""), command
        assert out.strip()


def test_ctrl_c_during_an_import_is_an_interruption(call, monkeypatch):
    def load(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None  # what pybind11's modules make of it

    monkeypatch.setattr(cli, "_run", load)
    assert call("plan") == (130, "", "error: Interrupted.\n")
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])  # other mistakes of ours are shown


def test_a_runs_folder_is_no_place_for_a_plan(call, small, tmp_path):
    call("plan", *small, f"out={tmp_path}")
    assert call("plan", "-v", *small, f"out={tmp_path}")[0] == 0, "a plan may be replaced by another"
    (tmp_path / "run.json").write_text("{}")
    kept = (tmp_path / "plan.json").read_bytes()
    for command in ("plan", "evaluate"):
        code, _, err = call(command, *small, "quant.bits=[16]", f"out={tmp_path}")
        assert code == 1
        assert f"{tmp_path} holds a run, whose files" in err
    assert (tmp_path / "plan.json").read_bytes() == kept
    assert not (tmp_path / "failure.json").exists()


def test_a_commands_help_has_its_groups_and_keys(call):
    code, out, err = call("plan", "--help", "cluster=cluster3")
    assert (code, err) == (0, "")
    assert "engine: default\n" in out
    assert "max_quality_loss: 0.02\n" in out
    assert "name: cluster3\n" in out
    assert "task:" not in out  # a group of another command


def test_a_configuration_is_composed_once(call, small, tmp_path, monkeypatch):
    composed = []
    compose = config.compose
    monkeypatch.setattr(config, "compose", lambda **keys: composed.append(keys) or compose(**keys))
    monkeypatch.setattr(hydra, "main", None)
    assert call("plan", *small, f"out={tmp_path}")[0] == 0
    assert len(composed) == 1
    assert {file.name for file in (tmp_path / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}


@pytest.mark.slow
def test_a_sweep_writes_a_plan_a_point_and_a_summary(call, small, tmp_path):
    swept = ["planner.theta=0.1,1,10", "quant.bits=[4,8],[3,4,8,16]"]
    out = tmp_path / "sweep"
    code, text, _ = call("plan", "-m", *swept, *small, f"out={out}")
    assert code == 0
    assert len(list(out.glob("*/plan.json"))) == 6
    with open(out / "summary.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    assert {row["exit_code"] for row in rows} == {"0"}
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "summary.csv" in text


def test_the_pareto_front_drops_what_is_beaten():
    points = [
        {"quality_loss": loss, "throughput_tokens_per_second": speed}
        for loss, speed in [(0.0, 10.0), (0.1, 9.0), (0.2, 20.0), (0.2, 15.0), (0.3, 20.0)]
    ]
    assert [(p["quality_loss"], p["throughput_tokens_per_second"]) for p in sweep.select_pareto_front(points)] == [
        (0.0, 10.0),
        (0.2, 20.0),
    ]


def test_the_front_is_a_folder_a_plan(call, small, tmp_path):
    code, out, _ = call("plan", *small, "planner.mode=pareto", "planner.time_limit_seconds=30", f"out={tmp_path / 'f'}")
    assert code == 0
    plans = [read_plan(file) for file in sorted((tmp_path / "f").glob("plan*/plan.json"))]
    assert len(plans) >= 2
    losses = [plan.predicted.quality_loss for plan in plans]
    speeds = [plan.predicted.throughput_tokens_per_second for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert speeds == sorted(speeds, reverse=True)
    assert "summary.csv" in out


def test_a_plan_made_by_hand_is_checked_and_costed(call, small, tmp_path):
    hand = tmp_path / "hand.json"
    stages = [
        {"device": "localhost:0", "layers": [0, 6], "bits": 4},
        {"device": "localhost:1", "layers": [6, 8], "bits": [8, 4]},
    ]
    hand.write_text(json.dumps({"stages": stages, "micro_batch": {"prefill": 2, "decode": 8}}))
    code, _, _ = call("plan", *small, f"check={hand}", f"out={tmp_path / 'c'}")
    plan = read_plan(tmp_path / "c" / "plan.json")
    assert code == 0
    assert [stage.bits for stage in plan.stages] == [(4,) * 6, (8, 4)]
    assert plan.solver.status == "checked"
    # its own plan.json says the same when it is checked again
    call("plan", *small, f"check={tmp_path / 'c' / 'plan.json'}", f"out={tmp_path / 'd'}")
    assert read_plan(tmp_path / "d" / "plan.json").predicted == plan.predicted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": [{"device": "localhost:0", "layers": [0, 8], "bits": 16}]}, "localhost:0"),
        ({"stages": [{"device": "localhost:9", "layers": [0, 8], "bits": 4}]}, "localhost:9"),
        ({"stages": [{"device": "localhost:0", "layers": [1, 8], "bits": 4}]}, "begin at 0"),
        ({"stages": [{"device": "localhost:0", "layers": [0, 8], "bits": 4, "rank": 1}]}, "rank"),
        ({"stages": []}, "stages"),
        ({"micro_batch": {"prefill": 3, "decode": 8}}, "3"),
        ({"micro_batch": {"prefill": 2}}, "decode"),
    ],
)
def test_a_wrong_plan_made_by_hand_is_one_sentence(call, small, tmp_path, change, said):
    hand = tmp_path / "hand.json"
    plan = {
        "stages": [
            {"device": "localhost:0", "layers": [0, 6], "bits": 4},
            {"device": "localhost:1", "layers": [6, 8], "bits": 4},
        ],
        "micro_batch": {"prefill": 2, "decode": 8},
    }
    hand.write_text(json.dumps(plan | change))
    code, _, err = call("plan", *small, f"check={hand}", f"out={tmp_path / 'c'}")
    assert code == 1
    assert said in err
    assert len(err.splitlines()) == 1


def test_pins_are_kept(call, small, tmp_path):
    pins = ["+planner.pins.bits={0:3}", "+planner.pins.micro_batch={decode:8}"]
    pins.append("+planner.pins.order=['localhost:0','localhost:1']")
    code, _, err = call("plan", *small, *pins, f"out={tmp_path / 'p'}")
    assert (code, err) == (0, "")
    plan = read_plan(tmp_path / "p" / "plan.json")
    assert plan.stages[0].bits[0] == 3
    assert plan.micro_batch.decode == 8
    assert [stage.device for stage in plan.stages] == ["localhost:0", "localhost:1"]


def test_a_pipe_that_the_shell_opened_is_kept_as_a_file(call, small, tmp_path):
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5] * 40, "max_tokens": 3}}
    reading, writing = os.pipe()
    os.write(writing, json.dumps(row).encode())
    os.close(writing)
    try:
        model = Path(__file__).parents[1] / "assets" / "tiny-llama"
        code, _, err = call(
            "plan", "cluster=demo_cpu2", f"model.path={model}", f"input=/dev/fd/{reading}", f"out={tmp_path}"
        )
    finally:
        os.close(reading)
    assert (code, err) == (0, "")
    assert read_plan(tmp_path / "plan.json").workload.prompt_tokens == 40
    [kept] = tmp_path.glob("input-*.jsonl")
    assert json.loads(kept.read_text()) == row


@pytest.mark.parametrize("wrong", ["batch.max_tokens=0", "batch.temperature=3"])
def test_defaults_out_of_range_are_said_before_planning(call, small, tmp_path, wrong):
    code, _, err = call("plan", *small, wrong, f"out={tmp_path}")
    assert code == 1
    assert err.startswith(f"error: {wrong.partition('=')[0]} is ")
    assert not (tmp_path / "plan.json").exists()
