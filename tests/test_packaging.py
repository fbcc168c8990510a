"""What an installed wheel carries: configuration, demonstration prompts and the small model are found inside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_finds_its_configuration_and_assets(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    copy = tmp_path / "copy"  # building leaves folders behind, and picks up those that an earlier build left
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "runs", "__pycache__", "dist")
    shutil.copytree(ROOT, copy, ignore=left_out)
    subprocess.run([*build, str(copy)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "ds_llmpq" / "py.typed").is_file()  # type checkers read annotations only then
    code = (
        "from ds_llmpq import config; from ds_llmpq.serving.batch_run import choose_model; from pathlib import Path; "
        "s = choose_model(config.to_object(config.compose_settings('run', []), config.COMMANDS['run'])); "
        "print(config.conf_folder()); print(s.model.path); print(s.input); "
        "print(Path(s.model.path, 'config.json').is_file(), Path(s.input).is_file())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    conf, model, prompts, found = result.stdout.splitlines()
    assert all(path.startswith(str(site)) for path in (conf, model, prompts))
    assert found == "True True"
