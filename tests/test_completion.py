"""What a shell completes, asked as the shell asks: its own completion function, without a terminal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_llmpq import completion, config, overrides

ROOT = Path(__file__).parents[1]
# what is typed -> what is among the offers
TYPED = {
    "ds-llmpq pl": "plan",
    "ds-llmpq plan planner.th": "planner.theta=",
    "ds-llmpq run cluster=local_cpu2 workload.seq": "workload.sequences=",
    "ds-llmpq plan cluster=mixed": "mixed_gpus",
    "ds-llmpq run +experiment=de": "demo",
    "ds-llmpq lengths tr": "train",
    "ds-llmpq plan hydra/laun": "hydra/launcher=",
}


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_every_key_can_be_reached_and_nothing_else_is_offered(command):
    keys = set(overrides.list_keys(config.COMMANDS[command])) | set(
        overrides.list_groups(config.COMMANDS[command], config.conf_folder())
    )
    seen, words = set(), [""]
    while words:
        for offer in completion.complete(command, words.pop()):
            seen.add(offer.rstrip("=."))
            words += [offer] if offer.endswith(".") else []
    actions = set(completion._ACTIONS.get(command, ()))
    assert seen == keys | actions


@pytest.fixture(scope="module")
def shell_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "ds-llmpq"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ds_llmpq "$@"\n')
    command.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


def in_shell(shell, text, environment):
    done = subprocess.run([shell, "-c", text], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("asked", ["completion bash", "plan -sc install=bash", "-sc install=bash"])
def test_bash_completes(shell_path, asked):
    lines = "\n".join(
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_WORDS=({line}); _ds_llmpq; echo "${{COMPREPLY[*]}};"'
        for line in TYPED
    )
    # compopt works within a completion alone
    offers = in_shell(
        "bash", f"source <(ds-llmpq {asked}); compopt() {{ :; }}; complete -p ds-llmpq; {lines}", shell_path
    )
    for expected in TYPED.values():
        assert expected in [offer.rstrip(";") for offer in offers]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize("line", TYPED)
def test_fish_completes(shell_path, line):
    offers = in_shell("fish", f"ds-llmpq completion fish | source; complete -C '{line}'", shell_path)
    assert any(offer.endswith(TYPED[line]) for offer in offers)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.parametrize("line", TYPED)
def test_zsh_completes(shell_path, line):
    stubs = "compdef() { :; }; compset() { :; }; _files() { :; }; compadd() { print -l -- ${@[5,-1]}; }"
    words = f"words=({line}); CURRENT=$#words"
    offers = in_shell("zsh", f"{stubs}; source <(ds-llmpq completion zsh); {words}; _ds_llmpq", shell_path)
    assert any(offer.endswith(TYPED[line]) for offer in offers)


def test_another_shell_is_one_sentence(shell_path):
    done = subprocess.run(
        ["ds-llmpq", "completion", "tcsh"], env=shell_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: completion takes one of bash, zsh, fish")
