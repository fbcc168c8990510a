"""`ds-llmpq completion bash|zsh|fish`: a script that completes commands, keys, groups and their entries.

The script calls `ds-llmpq completion words COMMAND WORD`, which loads neither Hydra's application nor torch, and uses
the keys that the command line is checked against.
"""

from __future__ import annotations

from ds_llmpq import config, overrides
from ds_llmpq.errors import UserError

_ACTIONS = {
    "lengths": ("prepare", "train", "evaluate", "predict", "characterize"),
    "report": ("run", "sweep", "fidelity"),
}
_OTHERS = ("completion", "--help", "--version")

_BASH = """\
_ds_llmpq() {
    local word="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local last="${word##* }"
    local command=""
    [[ "$word" == *" "*" "* ]] && command="${COMP_WORDS[1]}"
    COMPREPLY=($(ds-llmpq completion words "$command" "$last" 2>/dev/null))
    # bash takes `=` and `:` for ends of words: only what follows the last one is put in
    local break="${last%"${last##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$break"}")
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace
    [[ ${#COMPREPLY[@]} -eq 0 ]] && compopt -o default
    return 0
}
complete -F _ds_llmpq ds-llmpq
"""
_ZSH = """\
#compdef ds-llmpq
_ds_llmpq() {
    local command=""
    local -a found
    (( CURRENT > 2 )) && command="${words[2]}"
    found=("${(@f)$(ds-llmpq completion words "$command" "${words[CURRENT]}" 2>/dev/null)}")
    if [[ -z "${found[*]}" ]]; then
        compset -P '*='
        _files
    else
        compadd -Q -S '' -- "${found[@]}"
    fi
}
compdef _ds_llmpq ds-llmpq
"""
_FISH = """\
function __ds_llmpq
    set -l before (commandline -opc)
    set -l command ""
    test (count $before) -gt 1; and set command $before[2]
    ds-llmpq completion words "$command" (commandline -ct) 2>/dev/null
end
complete -c ds-llmpq -f -a "(__ds_llmpq)"
"""
SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def main(arguments: list[str]) -> int:
    """Prints a shell's script, or (`words COMMAND WORD`, for the scripts) the completions of WORD."""
    if arguments[:1] == ["words"]:
        command, word = [*arguments[1:], "", ""][:2]
        print("\n".join(complete(command, word)))
        return 0
    usage = f"completion takes one of {', '.join(SHELLS)}; for bash, `source <(ds-llmpq completion bash)` in ~/.bashrc."
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(usage)
    print(SHELLS[arguments[0]], end="")
    return 0


def parse_install(arguments: list[str]) -> list[str]:
    """The arguments of `main` for Hydra's own form, `-sc install=bash`."""
    return [argument.removeprefix("install=") for argument in arguments if argument.startswith("install=")]


def complete(command: str, word: str) -> list[str]:
    """Completions of a word: commands if none is given, else keys one level at a time, groups, and their entries."""
    if not command:
        return [name for name in (*config.COMMANDS, *_OTHERS) if name.startswith(word)]
    if command == "completion":
        return [name for name in SHELLS if name.startswith(word)]
    if command not in config.COMMANDS:
        return []
    kind = config.COMMANDS[command]
    groups = overrides.list_groups(kind, config.conf_folder())
    key, equals, start = word.partition("=")
    if equals:
        return [f"{key}={name}" for name in groups.get(key.lstrip("+"), ()) if name.startswith(start)]
    plus, word = word[: len(word) - len(word.lstrip("+"))], word.lstrip("+")
    found = [f"{name}=" for name in groups]
    names = overrides.list_keys(kind)
    inner = {name.rpartition(".")[0] for name in names}
    depth = word.count(".")
    for name in names:
        if name.count(".") == depth:
            found += [f"{name}."] if name in inner else [f"{name}="]
    if not depth and not plus:
        found += _ACTIONS.get(command, ())
    return sorted({plus + name for name in found if name.startswith(word)})
