"""A trial's ranks, which have a session of their own, end with the command that started them."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

SPEC = {"kind": "cpu", "threads": 1, "path": "x", "dtype": "float32", "sizes": [1], "prompt_tokens": 4}
COMMAND = f"""
import sys, types
from pathlib import Path
from ds_llmpq.profiling import trial_process
trial_process.sys = types.SimpleNamespace(executable=sys.argv[1])
trial_process.run_trial({SPEC!r}, Path(sys.argv[2]))
"""


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_ranks_too(tmp_path, number):
    rank, file = tmp_path / "rank.sh", tmp_path / "pid"
    rank.write_text(f"#!/bin/sh\necho $$ > {file}.part\nmv {file}.part {file}\nexec sleep 600\n")
    rank.chmod(0o755)
    started = subprocess.Popen([sys.executable, "-c", COMMAND, rank, tmp_path / "log"])
    try:
        while not file.exists():
            assert started.poll() is None
            time.sleep(0.05)
        child = psutil.Process(int(file.read_text()))
        started.send_signal(number)
        assert started.wait(timeout=120) == 128 + number
        while is_alive(child):  # killed, but perhaps not gone yet; else the test's time runs out
            time.sleep(0.05)
    finally:
        started.kill()
