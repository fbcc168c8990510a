"""`ds-llmpq COMMAND [hydra overrides]`: runs a command, and reports a user's mistake in one sentence."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ds_llmpq import __version__, completion, config
from ds_llmpq.batch.results import check_folder
from ds_llmpq.engine.openmp import wait_briefly
from ds_llmpq.errors import Interrupted, RunFailed, UserError
from ds_llmpq.files import keep_open_pipe, refuse_unwritable
from ds_llmpq.report import sweep, sweep_cache
from ds_llmpq.versions import check_versions

# commands whose ranks know their layers, and so how long their threads should wait
_COMPUTED_BY_RANKS = frozenset({"run", "evaluate", "serve", "plan"})
# Hydra's own flags for completion, which expect a program without commands
_HYDRAS_COMPLETION = {"-sc", "--shell-completion", "--shell_completion"}
_LEAST_FREE_BYTES = 32 << 10
_READS_FAILURES = frozenset({"report"})  # may write its pages into the folder that they describe
# commands whose first argument may be a bare word, and the key it stands for
_WORD_KEYS = {"report": "what", "lengths": "action"}

_USAGE = """usage: ds-llmpq COMMAND [key=value ...]     (ds-llmpq COMMAND --help shows a command's keys)

  detect       describe this machine, or the hosts of hostfile=FILE, as a cluster
  merge        FILE FILE ...: one cluster of several cluster files
  profile      time this machine's devices on the model, for `plan planner.profile=DIR`
  sensitivity  what each layer loses at each width, for `plan planner.sensitivity=FILE`
  plan         decide layers, bit widths and micro-batches; writes plan.json, problem.json, hostfile
  quantize     write the model at a plan's widths, for `run quantized=DIR`
  run          plan if needed, start DeepSpeed, turn a file of prompts into a file of results
  serve        one rank of a planned pipeline, started by the deepspeed launcher
  evaluate     perplexity and divergence of a plan on its pipeline, predicted against measured
  report       run=DIR | sweep=DIR | fidelity profile=DIR: a page, pictures and tables of what happened
  export       plan=FILE to=vllm|llama_cpp|deepspeed: a plan for another system
  lengths      prepare | train | evaluate | predict | characterize: how long answers will be
  simulate     scheduling policies on simulated arrivals: FCFS, SJF, SSJF, with and without batching
  completion   bash | zsh | fish: a script for the shell, e.g. `source <(ds-llmpq completion bash)`
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or 1 (a mistake), 2 (no plan exists), 3 (some requests failed)."""
    if hasattr(signal, "SIGPIPE") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ds-llmpq plan | head` ends quietly
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        sys.exit(print(_USAGE))
    if command == "--version":
        sys.exit(print(__version__))
    words = [argument for argument in rest if not argument.startswith("-") and "=" not in argument]
    if command in _WORD_KEYS and words[:1] == rest[:1] != []:
        rest[0] = f"{_WORD_KEYS[command]}={rest[0]}"
    if command == "merge" and words:
        rest = [f"files={json.dumps(words, ensure_ascii=False)}", *(each for each in rest if each not in words)]
    try:
        check_versions()
        if command == "completion" or {command, *rest} & _HYDRAS_COMPLETION:
            sys.exit(completion.main(rest if command == "completion" else completion.parse_install(rest)))
        if command not in config.COMMANDS:
            raise UserError(f"There is no command {command!r}; the commands are {', '.join(config.COMMANDS)}.")
        if command not in _COMPUTED_BY_RANKS:
            wait_briefly()  # they may multiply with any kernel
        if command == "serve":
            code = importlib.import_module("ds_llmpq.commands.serve").main(rest)
        else:
            code = _through_hydra(command, rest)
    except UserError as error:
        code = report(error)
    except KeyboardInterrupt:
        code = report(Interrupted("Interrupted."))
    sys.exit(code)


def report(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _through_hydra(command: str, arguments: list[str]) -> int:
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
        return report(error)


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
        return report(error)


if __name__ == "__main__":
    main()
