"""What runs one job of Hydra's without `hydra.main`: `run_job`, which launchers call, and the callbacks it is given."""

from pathlib import Path

LIBRARY = "hydra-core"
SEEN = ("1.3.2", "1.3.8")


def test_callbacks_and_a_job(tmp_path):
    """`Callbacks(config)`, in hydra_app.py: notifies the callbacks of a configuration; with `run_job(task, config,
    job_dir_key, job_subdir_key, context)` a job runs as `hydra.main` would run it."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode

    (tmp_path / "job.yaml").write_text("size: 1\nhydra:\n  run:\n    dir: ???\n")
    with initialize_config_dir(str(tmp_path), job_name="job", version_base="1.3"):
        overrides = ["size=2", f"hydra.run.dir={tmp_path}/out"]
        config = compose(config_name="job", overrides=overrides, return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(config))
    config.hydra.mode = RunMode.RUN
    context.callbacks.on_run_start(config=config, config_name="job")
    result = run_job(lambda task: dict(task), config, "hydra.run.dir", None, context)
    context.callbacks.on_run_end(config=config, config_name="job", job_return=result)
    assert result.return_value == {"size": 2}
    assert "size: 2" in Path(tmp_path, "out", ".hydra", "config.yaml").read_text()
