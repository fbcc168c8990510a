"""What the launcher hands to every rank."""

import os
from pathlib import Path

import pytest

from ds_llmpq.cli import main
from ds_llmpq.engine.launcher import Launch, environment


@pytest.mark.parametrize(("own", "expected"), [(None, "10000"), ("7", "7")])
def test_how_long_openmp_waits_is_every_rank_s_and_the_user_s_to_say(monkeypatch, own, expected):
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == expected
    launch = Launch(Path("hostfile"), "localhost", ("localhost",), "cpu", {}, Path("."))
    assert environment(launch)["GOMP_SPINCOUNT"] == expected
    assert environment(launch)["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
