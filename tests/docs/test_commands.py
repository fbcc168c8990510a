"""What the documentation says to run, runs: every block marked runnable, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ds_llmpq import config, overrides
from ds_llmpq.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```bash runnable( slow)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\s*(?:python -m )?ds[-_]llmpq +([a-z]+)\b([^\n#]*)", re.MULTILINE)


def blocks(slow):
    return [
        pytest.param(page, index, match[2], id=f"{page.name}-{index}")
        for page in PAGES
        for index, match in enumerate(_BLOCK.finditer(page.read_text()))
        if bool(match[1]) == slow
    ]


def run(text, folder):
    """A shell that stops at the first failure; `ds-llmpq` is this checkout's."""
    shim = folder / ".bin"
    shim.mkdir()
    command = shim / "ds-llmpq"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ds_llmpq "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{shim}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index", "text"), blocks(slow=False))
def test_a_block_runs(page, index, text, tmp_path):
    run(text, tmp_path)


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize(("page", "index", "text"), blocks(slow=True))
def test_a_block_with_a_launcher_runs(page, index, text, tmp_path):
    run(text, tmp_path)


def test_there_are_blocks_to_run():
    assert len(blocks(slow=False)) >= 4
    assert len(blocks(slow=True)) >= 1


def test_every_command_names_a_command_and_keys_that_exist():
    """Of all blocks, runnable or not: a command, and keys of its configuration."""
    known, checked = {}, 0
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|sh)[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for command, rest in _COMMAND.findall(block.replace("\\\n", " ")):
                assert command in config.COMMANDS, f"{page.name}: ds-llmpq {command}"
                if command not in known:
                    known[command] = OmegaConf.structured(config.COMMANDS[command])
                for key in re.findall(r"(?:^|\s)'?([a-z_]+(?:\.[a-z_]+)*)=", rest):
                    checked += 1
                    if key.split(".")[0] not in ("hydra", "experiment", "comparison"):
                        assert _has(known[command], key), f"{page.name}: ds-llmpq {command} has no {key}"
    assert checked > 60


_INLINE = re.compile(r"`([^`\n]+)`")
_ARGUMENTS = {"key=", "make_costs=", "formula=", "solver=", "pins=", "settings="}  # of Python functions, or any key
_OPTION = re.compile(r"^'?(\+{0,2}[a-z_]+(?:[./][a-z_]+)*=)")


def test_every_option_in_the_text_is_one_of_some_command():
    """Of tables and sentences: what stands there as `key=value` is taken by a command."""
    checked, unknown = 0, []
    for page in PAGES:
        for code in _INLINE.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)):
            for key in (match[1] for word in code.split() if (match := _OPTION.match(word))):
                checked += 1
                if key not in _ARGUMENTS and not any(_takes(command, f"{key}x") for command in config.COMMANDS):
                    unknown.append(f"{page.name}: `{code}`: {key}")
    assert checked > 80
    assert not unknown


def test_every_key_is_named_somewhere():
    """By its last part, in a page; what a cluster file or config.json of a model holds is described as a whole."""
    text = "\n".join(page.read_text() for page in PAGES)
    keys = {key for kind in config.COMMANDS.values() for key in overrides.list_keys(kind)}
    assert len(keys) > 200
    positional = {"action", "what", "files"}
    lacking = sorted(key for key in keys - positional if not re.search(rf"\b{key.rpartition('.')[2]}\b", text))
    assert not lacking


def _takes(command, argument):
    try:
        config.prepare(command, [argument])
    except UserError:
        return False
    return True


def test_documented_pins_are_taken():
    found = [code for page in PAGES for code in _INLINE.findall(page.read_text()) if "planner.pins=" in code]
    assert len(found) >= 2
    for code in found:
        assert config.compose_settings("plan", [code.strip("'").replace("[...]", "[a:0]")]).planner.pins


def _has(settings, key):
    node = settings
    for part in key.split("."):
        if part not in node:
            return False
        node = node[part]
        if not OmegaConf.is_config(node):
            break
    return True
