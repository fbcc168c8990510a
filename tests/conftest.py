"""Settings of all tests.

Hypothesis draws the same examples every time, so that a change is judged by its own effect; fresh ones are drawn by
HYPOTHESIS_PROFILE=explore, which a developer runs to look for what the fixed ones miss.
"""

import logging
import os
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None)
# what a test plans must not hang on how fast this machine is just now; tests of calibration ask for it
os.environ["DS_LLMPQ_CALIBRATE"] = "never"
# started in the background by a shell, this process ignores SIGINT, and so would all that it starts to interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def streams_stay_open(monkeypatch):
    """absl, which OpenVINO imports, has a logging handler that closes the stream it was made with unless that is still
    standard error. Under pytest it never is; Hydra's logging set-up closes all handlers, and with them pytest's own."""
    if absl_logging := sys.modules.get("absl.logging"):
        monkeypatch.setattr(absl_logging.PythonHandler, "close", logging.Handler.close)
