"""Tables and verdicts on predictions; the command on a run's and a profile's folder."""

import json

import pytest

from ds_llmpq.commands import report
from ds_llmpq.commands.config import ReportConfig
from ds_llmpq.errors import UserError
from ds_llmpq.report.fidelity import TimePair, format_errors, pair_run, verdict


def pairs(*errors):
    return [TimePair("core", "decode", "4", (1 + error) * 0.01, 0.01) for error in errors]


def test_errors_are_relative_to_the_measurement():
    text = format_errors([*pairs(0.1, -0.3), TimePair("core", "prefill", "8", 2.0, 1.0)])
    decode, prefill = text.splitlines()[2:]
    assert decode.split() == ["core", "decode", "4", "2", "20.0", "%", "-30.0", "%", "-10.0", "%", "7", "/", "10"]
    assert "+100.0 %" in prefill


@pytest.mark.parametrize(
    ("errors", "said"),
    [((0.01, -0.05), "can be trusted"), ((0.2, 0.0), "good enough to rank"), ((0.5, 0.4), "do not trust")],
)
def test_the_verdict_follows_the_mean(errors, said):
    text = verdict(pairs(*errors), "passes")
    assert said in text
    assert f"{100 * max(map(abs, errors)):.1f} % at worst" in text


@pytest.fixture
def run_folder(tmp_path):
    memory = {"weights": 10, "kv": 20, "embed": 0, "head": 0, "workspace": 5, "total": 35}
    stage = {
        "stage": 0,
        "device": "localhost:0",
        "passes": {"prefill": 2, "decode": 8, "sample": 10},
        "seconds": {"prefill": 0.2, "decode": 0.08, "sample": 0.01},
        "pass_seconds": {
            "prefill": {"predicted": 0.1, "measured": 0.1},
            "decode": {"predicted": 0.012, "measured": 0.01},
        },
        "memory_bytes": {"predicted": memory, "measured": {"weights": 10, "kv": 20, "peak_growth": 70}},
    }
    total = {"predicted": 1.0, "measured": 2.0, "ratio": 2.0}
    totals = {f"{name}_seconds": total for name in ("latency", "prefill", "decode")}
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = {"stages": [stage], "predicted_against_measured": totals}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "plan.json").write_text(json.dumps({"stages": [{"bits": [4, 16, 4]}]}))
    return folder


def test_passes_are_held_against_the_predictions_of_their_own_sizes(run_folder):
    prefill, decode = pair_run(run_folder)
    assert (prefill.bits, prefill.measured_seconds) == ("4/16", pytest.approx(0.1))
    assert decode.error == pytest.approx(0.2)


def test_the_command_writes_table_and_scatter(run_folder, tmp_path, capsys):
    assert report.run(ReportConfig(what="fidelity", run=str(run_folder)), tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "latency: predicted 1.000 s, measured 2.000 s (-50.0 %)" in said
    assert "peak growth" in said
    assert said.count("verdict: the run took 2.00 times as long as predicted") == said.count("the plan's times") == 1
    assert (tmp_path / "out" / "fidelity.txt").read_text() in said
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ReportConfig(what="cake", run="x"), "report knows run, sweep and fidelity"),
        (ReportConfig(), "one of run=DIR, sweep=DIR and profile=DIR"),
        (ReportConfig(run="a", profile="b"), "one of run=DIR, sweep=DIR and profile=DIR"),
        (ReportConfig(run="nowhere"), "is no folder"),
        (ReportConfig(profile="nowhere"), "is no folder"),
    ],
)
def test_mistakes_are_said(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        report.run(settings, tmp_path)
