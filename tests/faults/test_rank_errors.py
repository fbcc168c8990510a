"""Exceptions put into a rank of a real run: they reach the user in one sentence, at once, and come but once."""

import json
import time

import pytest

# the harness has put the folder of these on the path
from harness import undisturbed, write_input
from launching import Command, error_sentence, gone

pytestmark = [pytest.mark.slow, pytest.mark.launcher]
DEMO = ("+experiment=demo", "run.backoff_seconds=0.2")
# read by every Python process of the run; rank 1's passes raise from the given one on
SHIM = """
import importlib.abc, importlib.machinery, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ds_llmpq.engine.pipeline_engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), change(module.InferencePipelineEngine))
        return spec

def change(engine):
    passes = [0]
    for instruction, function in list(engine._INSTRUCTION_MAP.items()):
        if instruction.__name__ in ("PrefillPass", "DecodePass"):
            engine._INSTRUCTION_MAP[instruction] = raising(function, passes)

def raising(function, passes):
    def run_pass(*arguments, **named):
        passes[0] += 1
        if passes[0] > AFTER:
            open(MARK, "a").write(f"{time.time()}\\n")
            raise ERROR
        return function(*arguments, **named)
    return run_pass

if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Finder())
"""
# rank 0 finds its port taken, the first time
TAKEN = """
import os, socket
if os.environ.get("RANK") == "0" and not os.path.exists(MARK):
    open(MARK, "w").close()
    taken = socket.socket()
    taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    taken.listen()
"""


def shim(monkeypatch, tmp_path, text, **names):
    """Has all processes of the run execute `text` first; returns a file that it may leave."""
    mark = tmp_path / "mark"
    values = "".join(f"{name} = {value}\n" for name, value in {"MARK": repr(str(mark)), **names}.items())
    (tmp_path / "sitecustomize.py").write_text(values + text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return mark


@pytest.mark.parametrize("error", ["RuntimeError('no such luck')", "TypeError('no such luck')"])
def test_an_exception_in_the_first_pass_ends_the_run_at_once(monkeypatch, tmp_path, error):
    mark = shim(monkeypatch, tmp_path, SHIM, ERROR=error, AFTER=0)
    command = Command(("run", f"out={tmp_path / 'out'}", *DEMO))
    ended = command.run()
    seconds = time.time() - float(mark.read_text().splitlines()[0])
    assert len(mark.read_text().splitlines()) == 1, "it was tried again"
    assert seconds < 100
    sentence = error_sentence(ended)
    for part in ("Rank 1 (stage 1, localhost:1 on localhost)", error.partition("(")[0], "no such luck", ".py:"):
        assert part in sentence
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())["failure"]
    assert (failure["rank"], failure["stage"], failure["message"]) == (1, 1, "no such luck")
    log = (tmp_path / "out" / "launcher.log").read_text()
    assert "no such luck" in log.splitlines()[-1]
    assert max(map(len, log.splitlines())) < 2_000
    assert gone(command.processes)


def test_one_after_results_is_tried_again_once(monkeypatch, tmp_path):
    """The second start meets it before any result."""
    rows = write_input(tmp_path / "rows.jsonl", 60)
    text = SHIM.replace("if passes[0] > AFTER:", "if passes[0] > (0 if os.path.exists(MARK) else AFTER):")
    mark = shim(monkeypatch, tmp_path, text, ERROR="RuntimeError('again')", AFTER=60)
    ended = Command(("run", f"input={rows}", f"out={tmp_path / 'out'}", *DEMO)).run()
    assert "again" in error_sentence(ended)
    assert len(mark.read_text().splitlines()) == 2
    assert (tmp_path / "out" / "results.jsonl").stat().st_size


def test_a_port_taken_meanwhile_is_left_to_who_took_it(monkeypatch, tmp_path):
    rows = write_input(tmp_path / "rows.jsonl", 10)
    expected = undisturbed(tmp_path / "quiet", rows)
    mark = shim(monkeypatch, tmp_path, TAKEN)
    assert undisturbed(tmp_path / "taken", rows) == expected
    assert mark.exists()
    restarts = json.loads((tmp_path / "taken" / "out" / "metrics.json").read_text())["restarts"]
    assert restarts["restarts"] == 0  # nothing of the run's own failed
