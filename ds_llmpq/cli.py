"""`ds-llmpq COMMAND [hydra overrides]`: runs a command, and reports a user's mistake in one sentence."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator

from ds_llmpq import __version__
from ds_llmpq.errors import Interrupted, UserError, print_error
from ds_llmpq.streams import find_lost_output, prepare_streams

# commands whose ranks know their layers, and so how long their threads should wait
_COMPUTED_BY_RANKS = frozenset({"run", "evaluate", "plan"})
# Hydra's own flags for completion, which expect a program without commands
_HYDRAS_COMPLETION = {"-sc", "--shell-completion", "--shell_completion"}
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
    prepare_streams()
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    words = [argument for argument in rest if not argument.startswith("-") and "=" not in argument]
    if command in _WORD_KEYS and words[:1] == rest[:1] != []:
        rest[0] = f"{_WORD_KEYS[command]}={rest[0]}"
    if command == "merge" and words:
        rest = [f"files={json.dumps(words, ensure_ascii=False)}", *(each for each in rest if each not in words)]
    with _count_interrupts() as interrupts:
        try:
            code = _run(command, rest)
        except UserError as error:
            code = print_error(error)
        except BaseException as error:
            # a library that is being imported may turn a KeyboardInterrupt into an ImportError
            if not interrupts and not isinstance(error, KeyboardInterrupt):
                raise
            code = print_error(Interrupted("Interrupted."))
    if lost := find_lost_output():
        said = UserError(
            f"what was to be printed could not be written ({lost.strerror}); make room or send it elsewhere."
        )
        code = code or print_error(said)
    sys.exit(code)


@contextlib.contextmanager
def _count_interrupts() -> Iterator[list[int]]:
    """Gives a list that grows with each Ctrl-C, which still raises KeyboardInterrupt. An ignored one stays ignored."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    own = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if own:
            signal.signal(signal.SIGINT, before)


def _run(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help", "help", "--version"):
        print(__version__ if command == "--version" else _USAGE)
        return 0
    # not before they are needed: Hydra and the schemas take longer to load than all else that `--help` does
    from ds_llmpq.versions import check_versions

    check_versions()
    if command == "completion" or {command, *rest} & _HYDRAS_COMPLETION:
        from ds_llmpq import completion

        return completion.main(rest if command == "completion" else completion.parse_install(rest))
    if command == "serve" and not {"-h", "--help"} & {*rest}:
        from ds_llmpq.commands import serve

        return serve.main(rest)
    from ds_llmpq import config, hydra_app
    from ds_llmpq.engine.openmp import wait_briefly

    if command not in config.COMMANDS:
        raise UserError(f"There is no command {command!r}; the commands are {', '.join(config.COMMANDS)}.")
    if command not in _COMPUTED_BY_RANKS:
        wait_briefly()
    return hydra_app.run_command(command, rest)


if __name__ == "__main__":
    main()
