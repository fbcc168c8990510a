"""What a rank says of the exception that ended it, and what is made of it."""

import socket
import subprocess
import sys

import pytest
import torch

from ds_llmpq.batch.request import derive_seed
from ds_llmpq.errors import UserError
from ds_llmpq.launch.failures import (
    CONNECTION,
    EXCEPTION,
    FAULT,
    MEMORY,
    Failure,
    Tracebacks,
    build_failure,
    find_root_cause,
    read_failure,
)


def raised(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TypeError("takes 3 arguments"), FAULT),
        (ImportError("no name"), FAULT),
        (NotImplementedError("no"), FAULT),
        (FileNotFoundError(2, "none", "x"), FAULT),
        (ValueError("odd"), EXCEPTION),
        (KeyError("x"), EXCEPTION),
        (RuntimeError("boom"), EXCEPTION),
        (SystemExit(3), EXCEPTION),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error"), CONNECTION),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4"), CONNECTION),
        (torch.distributed.DistNetworkError("gone"), CONNECTION),
        (ConnectionResetError(104, "reset"), CONNECTION),
        (MemoryError(), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
    ],
)
def test_kinds(error, kind):
    assert build_failure(error).kind == kind


def test_a_real_lost_connection_is_one():
    """gloo's own words when a neighbour dies."""
    code = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=2)
dist.barrier()
if sys.argv[1] == "1":
    os._exit(9)
from ds_llmpq.launch.failures import build_failure
try:
    dist.recv(torch.zeros(4), src=1)
except Exception as error:
    print(build_failure(error).kind)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-c", code]
    other = subprocess.Popen([*line, "1", f"tcp://127.0.0.1:{port}"])
    first = subprocess.run([*line, "0", f"tcp://127.0.0.1:{port}"], capture_output=True, text=True, timeout=120)
    other.wait(60)
    assert first.stdout.strip() == CONNECTION, first.stderr


def test_the_frame_is_the_innermost_of_ours():
    failure = build_failure(raised(derive_seed, 1, 2, 3, 4))
    assert failure.file.endswith("test_failures.py")  # none of ours: the call itself failed
    failure = build_failure(raised(derive_seed, 1, "\ud800"))
    assert (failure.file, failure.function) == ("ds_llmpq/batch/request.py", "derive_seed")


def test_a_line_comes_back_whole_with_a_host_before_it():
    failure = build_failure(raised(raise_, ValueError("a\x1b[31m\x07 b")), rank=3, stage=1, device="cpu:0", host="h")
    assert "\x1b" not in failure.message
    assert read_failure("10.0.0.1: " + failure.to_line()) == failure
    assert failure.describe().startswith("rank 3 (stage 1, cpu:0 on h) failed: ValueError: a")
    assert read_failure("another line") is None


def test_a_line_fits_a_pipe_whatever_the_message():
    line = build_failure(raised(raise_, ValueError("\u20ac\x01" * 100_000))).to_line()
    assert len(line.encode()) < 4096
    assert read_failure(line).type == "ValueError"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1", '"x"', "{" * 10_000])
def test_lines_that_only_look_like_one(text):
    assert read_failure(f"ds-llmpq failure: {text}") is None


def test_the_cause_among_several():
    lost, first = Failure(CONNECTION, "RuntimeError", "lost"), Failure(EXCEPTION, "ValueError", "first")
    assert find_root_cause([lost, first, Failure(FAULT, "TypeError", "later")]) is first
    assert find_root_cause([lost]) is lost
    assert find_root_cause([]) is None


def test_the_last_traceback_is_read():
    reader = Tracebacks()
    done = subprocess.run([sys.executable, "-c", "def f(): None.x\nf()"], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        reader.read("host: " + line)
    assert (reader.last.kind, reader.last.type, reader.last.function) == (FAULT, "AttributeError", "f")
    assert "has no attribute 'x'" in reader.last.message


def test_a_mistake_of_the_user_is_a_fault():
    assert build_failure(UserError("no")).kind == FAULT
