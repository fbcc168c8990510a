"""The optional log, with a stand-in for MLflow: one run a point; without MLflow a sentence."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

from omegaconf import OmegaConf
from report_folders import write_planned

from ds_llmpq.report.mlflow_log import MlflowLog


class Recorder:
    def __init__(self):
        self.runs, self.experiment = [], None

    def set_experiment(self, name):
        self.experiment = name

    @contextmanager
    def start_run(self, run_name):
        self.runs.append(SimpleNamespace(name=run_name, files=[]))
        yield

    def log_params(self, values):
        self.runs[-1].params = values

    def log_metrics(self, values):
        self.runs[-1].metrics = values

    def set_tags(self, values):
        self.runs[-1].tags = values

    def log_artifact(self, path):
        self.runs[-1].files.append(path)


def test_one_run_a_point(tmp_path, monkeypatch, capsys):
    for theta in ("1", "10"):
        point = tmp_path / f"theta={theta}"
        plan = write_planned(point)
        (point / ".hydra").mkdir()
        (point / ".hydra" / "overrides.yaml").write_text(f"- theta={theta}\n")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", recorder)
    MlflowLog().on_multirun_end(config)
    assert recorder.experiment == "ds_llmpq"
    assert [run.params for run in recorder.runs] == [{"theta": "1"}, {"theta": "10"}]
    for run in recorder.runs:
        assert run.metrics["quality_loss"] == plan.predicted.quality_loss
        assert run.files[0].endswith("plan.json")
        assert run.tags["failure"] == ""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    MlflowLog().on_multirun_end(config)
    assert "not installed" in capsys.readouterr().out
