"""Runs a command through Hydra: once, or many times with `-m`."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from ds_llmpq import config, overrides
from ds_llmpq.batch.results import check_folder
from ds_llmpq.errors import Interrupted, RunFailed, UserError, print_error
from ds_llmpq.files import keep_open_pipe, refuse_unwritable
from ds_llmpq.launch.journal import refuse_run_folder
from ds_llmpq.report import sweep, sweep_cache

_LEAST_FREE_BYTES = 32 << 10
# write files that a run has too, or a whole checkpoint
_REPLACES_FILES = frozenset({"plan", "evaluate", "quantize", "profile", "sensitivity"})
_READS_FAILURES = frozenset({"report"})  # may write its pages into the folder that they describe


def run_command(command: str, arguments: list[str]) -> int:
    """Runs a command once, or many times with -m; the worst exit code of all."""
    config.register(command)
    for library in ("matplotlib", "torch"):  # say how they looked for fonts, and at an early end what was in caches
        logging.getLogger(library).setLevel(logging.WARNING)
    if all(argument.startswith("out=") for argument in arguments):
        arguments = [*config.EXAMPLES.get(command, ()), *arguments]
    # commands without the key print all they know
    verbose = ["verbose=true"] if hasattr(config.COMMANDS[command], "verbose") else []
    arguments = [each for one in arguments for each in (verbose if one in ("-v", "--verbose") else [one])]
    flags = [argument for argument in arguments if argument.startswith("-")]
    arguments = config.prepare(command, arguments, sweep=bool({"-m", "--multirun"} & set(flags)))
    codes: list[int] = []

    def task(composed: DictConfig) -> int:
        codes.append(_run(command, composed))
        return codes[-1]

    if flags in (["--help"], ["-h"]):
        return _print_help(command, [argument for argument in arguments if argument not in flags])
    if not flags and not any(argument.startswith("hydra.mode=") for argument in arguments):
        composed, loader = config.compose_job(command, arguments)
        if any(argument.startswith("out=") for argument in arguments):
            _check_room(check_folder(config.make_absolute(composed.out)))
        return _run_once(composed, loader, task)
    sys.argv = [f"ds-llmpq {command}", *arguments]
    with sweep.collect_exit_codes() as of_points:
        hydra.main(version_base="1.3", config_path=str(config.conf_folder()), config_name=command)(task)()
    return max([0, *codes, *of_points])


def _run_once(composed: DictConfig, loader: ConfigLoader, task: Callable[[DictConfig], int]) -> int:
    """What `hydra.main` does, which would compose the configuration twice more."""
    composed.hydra.mode = RunMode.RUN
    configure_log(composed.hydra.hydra_logging, composed.hydra.verbose)
    callbacks = Callbacks(composed)
    callbacks.on_run_start(config=composed, config_name=composed.hydra.job.config_name)
    result = run_job(task, composed, "hydra.run.dir", None, HydraContext(loader, callbacks))
    callbacks.on_run_end(config=composed, config_name=composed.hydra.job.config_name, job_return=result)
    return result.return_value  # raises what the task raised


def _print_help(command: str, arguments: list[str]) -> int:
    """What Hydra's help says, in a tenth of its time, and only the groups that the command has."""
    kind = config.COMMANDS[command]
    groups = overrides.list_groups(kind, config.conf_folder())
    composed = config.compose_settings(command, arguments)
    print(f"{' '.join(kind.__doc__.split())}\n\nGroups (`group=entry`; experiments and comparisons with `+`):\n")
    print("".join(f"{name}: {', '.join(entries)}\n" for name, entries in groups.items()))
    print("Keys (`key=value`; `-m` with values `a,b` runs them all; `--hydra-help` shows Hydra's own flags):\n")
    print(OmegaConf.to_yaml(composed), end="")
    return 0


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
        if command in _REPLACES_FILES:
            refuse_run_folder(out)
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
        if command in _REPLACES_FILES:
            refuse_run_folder(out)
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
