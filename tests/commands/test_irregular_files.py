"""A pipe nobody writes to, a link to itself or a folder in the place of an input file: one sentence, at once."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from ds_llmpq.files import check_files, read_text

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def folder(path):
    path.mkdir()


KINDS = [pipe, loop, folder]

PLAN = ["plan", "workload=demo", "cluster=demo_cpu2"]
# every key of a command that names an input file
COMMANDS = {
    "cluster_file": [*PLAN, "cluster_file={}"],
    "problem": [*PLAN, "problem={}"],
    "check": [*PLAN, "check={}"],
    "input of plan": ["plan", "cluster=demo_cpu2", "input={}"],
    "sensitivity": [*PLAN, "planner.sensitivity={}"],
    "profile": [*PLAN, "planner.profile={}"],
    "input of run": ["run", "cluster=demo_cpu2", "input={}"],
    "plan of run": ["run", "+experiment=demo", "plan={}"],
    "hostfile of run": ["run", "+experiment=demo", "hostfile={}"],
    "plan of export": ["export", "to=vllm", "plan={}"],
    "plan of quantize": ["quantize", "plan={}"],
    "text of sensitivity": ["sensitivity", "model=tiny", "calibration.text={}"],
    "text of evaluate": ["evaluate", "+experiment=demo", "evaluation.text={}"],
    "gpus of detect": ["detect", "measure=false", "gpus={}"],
    "hostfile of detect": ["detect", "measure=false", "hostfile={}"],
    "files of merge": ["merge", "{}"],
    "data of lengths": ["lengths", "prepare", "data={}"],
    "cases of simulate": ["simulate", "mode=reference", "cases={}"],
    "data of simulate": ["simulate", "answers.kind=data", "answers.data={}"],
    "trace of simulate": ["simulate", "arrivals=trace", "arrivals.trace={}"],
}


@pytest.fixture(autouse=True)
def at_once():
    """Opening a pipe that nobody writes to would wait for ever."""

    def late(*_):
        raise TimeoutError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def said(call, *arguments):
    code, _, err = call(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_file_is_a_file(call, tmp_path, command, make):
    place = tmp_path / "given.jsonl"
    make(place)
    arguments = [argument.format(place) for argument in COMMANDS[command]]
    assert str(place) in said(call, *arguments, f"out={tmp_path / 'out'}")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "extra.safetensors", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("command", ["plan", "run", "quantize", "sensitivity"])
def test_a_checkpoint_s_files_are_files(call, tmp_path, command, name, make):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / name).unlink(missing_ok=True)
    make(model / name)
    more = {"quantize": ["widths=[4]"], "sensitivity": []}.get(command, PLAN[1:])
    assert name in said(call, command, f"model.path={model}", *more, f"out={tmp_path / 'out'}")


def test_a_link_to_a_file_is_a_file(tmp_path):
    """As the cache of downloaded models holds them."""
    (tmp_path / "blob").write_text("text")
    (tmp_path / "config.json").symlink_to("blob")
    (tmp_path / "not looked for").mkdir()
    check_files(tmp_path, "file", "mend it")
    assert read_text(tmp_path / "config.json", "file", "mend it") == "text"
