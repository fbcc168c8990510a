"""Optional: logs each point of a finished sweep as an MLflow run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ds_llmpq.report import sweep


class MlflowLog(Callback):
    """Hydra callback that runs once, in the parent process, after all points. Only this imports MLflow."""

    def __init__(self, experiment: str = "ds_llmpq", tracking_uri: str | None = None):
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            import mlflow
        except ImportError:
            print("MLflow is not installed, so nothing was logged there; pip install ds_llmpq[mlflow]")
            return
        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment(self.experiment)
        folder = Path(config.hydra.sweep.dir)
        for place in sweep.list_points(folder):
            log_point(mlflow, sweep.read_point(place), place)


def log_point(mlflow: Any, point: dict[str, Any], place: Path) -> None:
    """Swept keys become parameters, numbers metrics, and the rest tags; plan.json is an artifact."""
    numbers = {name: value for name, value in point.items() if isinstance(value, (int, float))}
    with mlflow.start_run(run_name=point["point"]):
        mlflow.log_params(point["overrides"])
        mlflow.log_metrics(numbers)
        mlflow.set_tags({"widths": point["widths"] or "", "failure": point["failure"] or ""})
        for name in ("plan.json", "metrics.json", "scores.json"):
            if (place / name).is_file():
                mlflow.log_artifact(str(place / name))
