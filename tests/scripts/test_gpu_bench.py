"""The command for GPUs, on a small model without one: every section gives figures, every check passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "environment", "ceilings", "families", "kernels", "engine", "model", "16 bits", "batches", "transformers", "4 bits",
    "8 bits", "transformers, compiled", "checks",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_for_gpus_runs_without_one(tmp_path):
    # far more minutes than it needs, for a machine that does other things
    command = [sys.executable, ROOT / "scripts" / "bench" / "gpu.py", "--device", "cpu", "--tiny", "--minutes", "30"]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=800, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert tuple(dict.fromkeys(line["section"] for line in lines)) == SECTIONS
    assert all(line["origin"] in ("measured", "none") or "computed" in line["origin"] or "fitted" in line["origin"]
               for line in lines)  # fmt: skip
    assert not [line for line in lines if line["what"] == "failed" or "time is up" in line["what"]]
    table = (tmp_path / "table.md").read_text()
    assert all(f"## {section}" in table for section in SECTIONS)
    by_rows = [line["rows"] for line in lines if line["what"] == "decode at 4 bits"]
    assert by_rows == [1, 2, 4]


@pytest.mark.slow
def test_it_ends_in_time_with_what_it_has(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "bench" / "gpu.py", "--device", "cpu", "--tiny", "--minutes", "0.2"]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert any("time is up" in line["what"] for line in lines), run.stdout
    assert lines[-1]["section"] == "checks"
    assert lines[-1]["at_seconds"] < 30
    assert (tmp_path / "table.md").is_file()
