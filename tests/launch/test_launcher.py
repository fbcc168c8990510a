"""What the launcher hands to every rank, and what a rank decides for itself before it imports torch."""

import os
from pathlib import Path

import pytest

from ds_llmpq.cli import main
from ds_llmpq.engine.openmp import VARIABLE, wait_briefly
from ds_llmpq.launch.launcher import Launch, build_environment


@pytest.fixture(params=[None, "7"])
def own(request, monkeypatch):
    """How long OpenMP shall wait, as the user has said or not; put back afterwards."""
    monkeypatch.setenv(VARIABLE, request.param or "")
    if request.param is None:
        monkeypatch.delenv(VARIABLE)
    return request.param


@pytest.mark.parametrize(("command", "expected"), [("run", None), ("profile", "3000")])
def test_only_the_user_s_waiting_time_goes_to_the_ranks(own, command, expected):
    with pytest.raises(SystemExit):
        main([command, "no.such.key=1"])
    assert os.environ.get(VARIABLE) == (own or expected)
    launch = Launch(Path("hostfile"), "localhost", ("localhost",), "cpu", {}, Path("."))
    assert build_environment(launch).get(VARIABLE) == (own or expected)
    assert build_environment(launch)["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")


def test_threads_wait_briefly_unless_the_user_says_otherwise(own):
    wait_briefly()
    assert os.environ[VARIABLE] == (own or "3000")
