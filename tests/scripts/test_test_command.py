"""The test command's exit status: that of what it ran, with a stand-in for each tool it calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def write_tool(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("fast", "slow", "lint", "status"), [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (1, 1, 1, 1)]
)
def test_status_is_that_of_what_ran(tmp_path, fast, slow, lint, status):
    tools = tmp_path / "venv" / "bin"
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "test_environment.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    write_tool(tmp_path / "scripts" / "install.sh", f"echo {tools.parent}")
    write_tool(tools / "python", f'case "$*" in *"not ("*) echo fast; exit {fast};; *) echo slow; exit {slow};; esac')
    write_tool(tools / "ruff", f"exit {lint}")
    for name in ("pdsh", "sshd", "ip", "zsh", "fish"):
        write_tool(tools / name, "exit 0")
    run = subprocess.run(
        [tmp_path / "scripts" / "test.sh"],
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert run.stdout.split()[:2] == ["slow", "fast"]
