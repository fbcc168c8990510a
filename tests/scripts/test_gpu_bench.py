"""The command for GPUs, on a small model without one: every section gives figures, every check passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "environment", "ceilings", "families", "kernels", "engine", "model", "16 bits", "batches", "4 bits", "pages",
    "both caches", "transformers", "two stages", "8 bits", "transformers, compiled", "bars", "checks",
)  # fmt: skip
STEP = {"rows": 1, "context": 256, "captured_ms": 4.5, "tokens_s": 222.0, "measured_over_predicted": 1.1}


def test_bars_say_what_was_measured_and_whether_it_is_met(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from gpu_bars import list_bars

    assert all(bar.found is None for bar in list_bars([]))
    batch = {"what": "batch: ShareGPT-like", "requests": 1000, "of": 1000, "captured_tokens_s": 13000.0,
             "device_busy_share": 0.9}  # fmt: skip
    lines = [
        {"what": "decode at 16 bits", **STEP},
        {"what": "decode at 4 bits", **STEP, "captured_ms": 2.5},
        {"what": "decode at 8 bits", **STEP, "captured_ms": 3.6, "measured_over_predicted": 0.7},
        {"what": "decode at 16 bits", **STEP, "rows": 64, "captured_ms": 7.0, "tokens_s": 9142.0},
        {"what": "prefill at 16 bits", "rows": 8, "tokens_s": 41000.0},
        {"what": "memory: ShareGPT-like", "peak_over_planned": 1.01},
        {"what": "generate, static cache, not compiled", "rows": 64, "ms": 20.0},
        batch,
    ]
    met = {bar.what: bar.met for bar in list_bars(lines) if bar.found is not None}
    assert met == {
        "decode, 16 bits, 1 x 256": True,
        "decode, 16 bits, 64 x 256": False,
        "prefill, 16 bits, best": True,
        "4 bits beside 16, 1 rows": False,  # 1.8 of 1.9
        "8 bits beside 16, 1 rows": False,
        "batch of 1,000, 16 bits, without the time to capture": True,
        "batch beside generate's steps on the same requests": True,
        "share of the batch in which the device waits": False,
        "passes, predicted without a profile": False,
        "device memory beside the plan": True,
    }
    batch["cut_by_time"] = True
    assert not [bar for bar in list_bars(lines) if bar.what.startswith("batch") and bar.found is not None]


def test_points_left_out_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from gpu_run import Run

    run = Run(tmp_path, torch.device("cpu"), True, 60.0)
    assert list(run.points("lm_head", [(DEQUANTIZE, 4)])) == [(DEQUANTIZE, 4)]
    run.section_ends = run.began
    assert list(run.points("lm_head", [(DEQUANTIZE, 4), (DEQUANTIZE, 8)])) == []
    assert list(run.points("rows", [1, "a"])) == []
    run.close()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [["dequantize 4", "dequantize 8"], ["1", "a"]]


class Replaced(Exception):
    """In the place of a process that goes on as another."""


def test_sections_after_a_lost_device_run_in_a_new_process(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    import gpu

    def replace(program, arguments):
        raise Replaced(arguments)

    monkeypatch.setattr(gpu, "is_lost", lambda device: True)
    monkeypatch.setattr(gpu.os, "execv", replace)
    run = gpu.Run(tmp_path / "out", torch.device("cpu"), True, 296.0)
    with pytest.raises(Replaced) as found:
        gpu.run_sections(run, ["ceilings", "model", "16 bits"], tmp_path, 300.0)
    [(_, script, *options)] = found.value.args
    assert Path(script).samefile(ROOT / "scripts" / "bench" / "gpu.py")
    assert options[-3:] == ["--sections", "model", "16 bits"]
    assert options[options.index("--again") + 1 : options.index("--again") + 3] == [str(tmp_path), str(run.began)]
    again = gpu.Run(tmp_path / "out", torch.device("cpu"), True, 296.0, run.began)
    assert again.lines == run.lines
    assert again.rates == run.rates
    assert again.ends == run.ends
    again.add("one more")
    again.close()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(run.lines) + 1


def test_a_process_that_takes_too_long_ends_with_all_that_it_has_started(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from gpu_batches import _run_for

    inner = "import time; print('begun', flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    # the pipes are open as long as the inner one lives
    assert _run_for([sys.executable, "-c", code], {}, 0.2)[0] == -9
    assert _run_for([sys.executable, "-c", "print(3)"], {}, 600.0) == (0, "3\n", "")


def test_a_device_in_use_is_not_lost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from gpu_run import is_lost

    assert not is_lost(torch.device("cpu"))
    assert is_lost(torch.device("cuda")) is not torch.cuda.is_available()


def test_what_is_not_installed_is_said_in_a_line(tmp_path):
    script = str(ROOT / "scripts" / "bench" / "gpu.py")
    code = f"import runpy, sys; sys.modules['pydantic'] = None; sys.argv = [{script!r}, '--out', 'o']; "
    code += f"sys.path.insert(0, {str(Path(script).parent)!r}); runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "gpu.py needs pydantic, which cannot be imported here; docs/gpu.md says what to carry"
    )


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
