"""failure.json stands where something failed, and nowhere else; a full disk is one sentence."""

import json
import os
import subprocess
import sys

import pytest

TOO_MUCH = "workload.sequences=4000"


def plan(call, out, *more):
    code, _, err = call("plan", "+experiment=demo", f"out={out}", *more)
    return code, err


def test_a_failure_is_forgotten_by_the_success_after_it(call, tmp_path):
    code, err = plan(call, tmp_path, TOO_MUCH)
    assert code == 2
    said = json.loads((tmp_path / "failure.json").read_text())
    assert said["exit_code"] == 2
    assert said["message"] in err
    assert plan(call, tmp_path)[0] == 0
    assert not (tmp_path / "failure.json").exists()


def test_a_refusal_leaves_no_failure_in_a_good_folder(call, tmp_path):
    assert plan(call, tmp_path)[0] == 0
    assert plan(call, tmp_path, TOO_MUCH)[0] == 2
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("size", ["4k", "40k"])
def test_a_full_disk_is_one_sentence(tmp_path, size):
    """A small file system, in a namespace of its own."""
    out = tmp_path / "out"
    out.mkdir()
    mount = 'mount -t tmpfs -o size="$1" none "$0" && shift && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, str(out), size]
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces need root")
    line = [*prefix, sys.executable, "-m", "ds_llmpq", "run", f"out={out}"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == ended.stderr.splitlines()[-1:]
    assert "make room" in ended.stderr
