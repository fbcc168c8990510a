"""Each command takes the keys that it reads, and no others."""

import ast
from pathlib import Path

import pytest

from ds_llmpq import config, overrides

PACKAGE = Path(config.__file__).parent
# written by Hydra or by the command line, and read there
STARTS_RANKS = {"run", "evaluate"}  # of `serve`, which read their part from the job
OF_THE_BORDER = {"out", "cluster_file"}


def modules_below(start):
    """Every module of the package that a module imports, at any depth, also inside functions."""
    found, left = set(), [start]
    while left:
        name = left.pop()
        file = PACKAGE.parent / (name.replace(".", "/") + ".py")
        file = file if file.is_file() else PACKAGE.parent / name.replace(".", "/") / "__init__.py"
        if name in found or not file.is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds_llmpq"):
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def words_of(module):
    """Attributes that a module reads, and its plain strings (`getattr` over a list of names)."""
    file = PACKAGE.parent / (module.replace(".", "/") + ".py")
    if not file.is_file():
        return set()
    nodes = list(ast.walk(ast.parse(file.read_text())))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return read | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_each_key_of_a_command_is_read_in_the_modules_it_uses(command):
    modules = modules_below(f"ds_llmpq.commands.{command}") - {"ds_llmpq.config", "ds_llmpq.overrides"}
    if command in STARTS_RANKS:
        modules |= modules_below("ds_llmpq.commands.serve")
    words = set().union(*map(words_of, modules))
    leaves = {key.rpartition(".")[2]: key for key in overrides.list_keys(config.COMMANDS[command])}
    assert not {key for leaf, key in leaves.items() if leaf not in words | OF_THE_BORDER}


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("evaluate", ["input=x", "batch.max_tokens=3", "check=x", "problem=x", "resume=force", "hostfile=x"]),
        ("evaluate", ["run.restarts=1", "run.on_loss=replan"]),
        ("profile", ["check=x", "problem=x", "planner.theta=3", "planner.solver=highs", "cost.source=published"]),
        ("run", ["check=x", "problem=x", "ablation.variant=grouped"]),
        ("plan", ["engine.timeout_seconds=3", "engine.master_port=3"]),
    ],
)
def test_keys_that_make_no_sense_for_a_command_are_refused(command, refused):
    for argument in refused:
        with pytest.raises(config.UserError, match=f"is no key of `ds-llmpq {command}`"):
            config.compose_settings(command, [argument])


def test_path_keys_are_those_of_the_dataclasses():
    assert {"out", "model.path", "planner.sensitivity", "batch.predictor"} <= overrides.list_path_keys(
        config.COMMANDS["plan"]
    )
    assert "planner.theta" not in overrides.list_path_keys(config.COMMANDS["plan"])
    assert {"lengths.tokenizer", "proxy.path"} <= overrides.list_path_keys(config.COMMANDS["lengths"])
