"""Runs a command through Hydra: once, or many times with `-m`."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ds_llmpq import config
from ds_llmpq.batch.results import check_folder
from ds_llmpq.errors import Interrupted, RunFailed, UserError, print_error
from ds_llmpq.files import keep_open_pipe, refuse_unwritable
from ds_llmpq.report import sweep, sweep_cache

_LEAST_FREE_BYTES = 32 << 10
_READS_FAILURES = frozenset({"report"})  # may write its pages into the folder that they describe


def run_command(command: str, arguments: list[str]) -> int:
    """Runs a command once, or many times with -m; the worst exit code of all."""
    config.register(command)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # says on its first use that it looked for fonts
    if all(argument.startswith("out=") for argument in arguments):
        arguments = [*config.EXAMPLES.get(command, ()), *arguments]
    arguments = ["verbose=true" if argument in ("-v", "--verbose") else argument for argument in arguments]
    flags = [argument for argument in arguments if argument.startswith("-")]
    arguments = config.prepare(command, arguments, sweep=bool({"-m", "--multirun"} & set(flags)))
    if not flags:
        # says a mistake in one sentence before Hydra says it in many lines
        composed = config.compose_settings(command, arguments)
        if any(argument.startswith("out=") for argument in arguments):
            _check_room(check_folder(config.make_absolute(composed.out)))
    codes: list[int] = []

    def task(composed: DictConfig) -> int:
        codes.append(_run(command, composed))
        return codes[-1]

    sys.argv = [f"ds-llmpq {command}", *arguments]
    with sweep.collect_exit_codes() as of_points:
        hydra.main(version_base="1.3", config_path=str(config.conf_folder()), config_name=command)(task)()
    return max([0, *codes, *of_points])


def _check_room(folder: Path) -> None:
    """`UserError` if not even the configuration fits, which Hydra would report with two tracebacks."""
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        raise UserError(
            f"{folder} has {free} bytes free, fewer than {_LEAST_FREE_BYTES}; make room or give another out=DIR."
        )


def _run(command: str, composed: DictConfig) -> int:
    config.register(command)  # a sweep's worker process starts without the resolvers
    module = importlib.import_module(f"ds_llmpq.commands.{command}")
    out = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _point(command, module, composed, out)
    try:
        held_work = sweep.holds_work(out)
        with refuse_unwritable(out):
            settings = config.to_object(composed, config.COMMANDS[command])
            if getattr(settings, "input", None):
                settings.input = str(keep_open_pipe(settings.input, out))
            code = module.run(settings, out)
        if command not in _READS_FAILURES:
            sweep.forget_failure(out)
        return code
    except UserError as error:
        if isinstance(error, RunFailed) or not (held_work or isinstance(error, Interrupted)):
            sweep.note_failure(out, error)
        return print_error(error)


def _point(command: str, module: ModuleType, composed: DictConfig, out: Path) -> int:
    """Runs a point of a sweep, unless its result from the same configuration exists."""
    try:
        made = sweep_cache.digest(command, OmegaConf.to_container(composed, resolve=True))
        if sweep_cache.is_done(out, command, made):
            print(f"kept: {out}")
            return 0
        sweep_cache.forget(out)
        sweep.forget_failure(out)
        with refuse_unwritable(out):
            run = getattr(module, "run_point", module.run)
            code = run(config.to_object(composed, config.COMMANDS[command]), out)
        if code == 0:
            sweep_cache.note_done(out, command, made)
        return code
    except UserError as error:
        sweep.note_failure(out, error)
        return print_error(error)
