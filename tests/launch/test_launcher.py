"""What the launcher hands to every rank, and what a rank decides for itself before it imports torch."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_llmpq.cli import main
from ds_llmpq.engine.openmp import VARIABLE, wait_as_stage_needs
from ds_llmpq.launch.launcher import Launch, build_environment


@pytest.fixture(params=[None, "7"])
def own(request, monkeypatch):
    """How long OpenMP shall wait, as the user has said or not; put back afterwards."""
    monkeypatch.setenv(VARIABLE, request.param or "")
    if request.param is None:
        monkeypatch.delenv(VARIABLE)
    return request.param


@pytest.mark.parametrize(("command", "expected"), [("run", None), ("profile", "10000")])
def test_only_the_user_s_waiting_time_goes_to_the_ranks(own, command, expected):
    with pytest.raises(SystemExit):
        main([command, "no.such.key=1"])
    assert os.environ.get(VARIABLE) == (own or expected)
    launch = Launch(Path("hostfile"), "localhost", ("localhost",), "cpu", {}, Path("."))
    assert build_environment(launch).get(VARIABLE) == (own or expected)
    assert build_environment(launch)["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("kernel", "bits", "lm_head_bits", "expected"),
    [
        ("openvino", (16, 4), 16, "10000"),
        ("openvino", (16, 16), 16, None),
        ("openvino", (16, 16), 8, "10000"),
        ("dequantize", (4, 4), 8, None),
    ],
)
def test_a_rank_waits_as_its_own_layers_and_lm_head_need(own, kernel, bits, lm_head_bits, expected):
    other = SimpleNamespace(rank=0, kernel="openvino", bits=(8,))
    stages = (other, SimpleNamespace(rank=1, kernel=kernel, bits=bits))
    plan = SimpleNamespace(stages=stages, lm_head_bits=lm_head_bits)
    wait_as_stage_needs(plan, 1)
    assert os.environ.get(VARIABLE) == (own or expected)
