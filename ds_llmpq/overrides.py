"""Prepares the command line for Hydra: checks that the command knows every key, quotes paths, and allows any keys in
free dictionaries (`planner.pins`).

In Hydra, `+key=value` may add unknown keys, which have no effect; here `+` is only for groups.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ds_llmpq.errors import UserError, quote
from ds_llmpq.fields import is_path

# Renamed keys: former -> present name. Add an entry when you rename a key: the former name is then accepted for one
# more version, and a note names the new one. An entry also covers the keys below it.
FORMER_KEYS: dict[str, str] = {
    "planner.omega": "planner.sensitivity",
    "quant.head_bits": "quant.lm_head_bits",
    "quant.whole_rows": "quant.per_channel_bits",
    "planner.variant": "ablation.variant",
    "planner.objective": "ablation.objective",
    "planner.group_layers": "ablation.group_layers",
}
# The same for entries of groups: (group, former name) -> present name
FORMER_ENTRIES: dict[tuple[str, str], str] = {
    ("cluster", "local_unlike2"): "local_heterogeneous2",
    ("cluster", "local_unlike3"): "local_heterogeneous3",
}
_OVERRIDE = re.compile(r"(\+\+|\+|~)?([^=]*)(?:=(.*))?", re.DOTALL)
_LONGEST_NAME = 120  # bytes; file systems take 255, some encrypted ones 143
_DIGEST_CHARACTERS = 10
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--config-dir",
    "-cd",
)
_CLOSED, _OPEN = "closed", "open"
_SPECIAL = re.compile(r"([\\()\[\]{}:=,\s])")


def prepare(command: str, kind: type, arguments: Iterable[str], conf: Path, sweep: bool = False) -> list[str]:
    """The arguments in Hydra's form. `kind`: the command's dataclass. `conf`: the folder of groups. `sweep`: values may
    be lists of points. `UserError`: a key that the command does not have, or two keys for the output folder."""
    arguments = [rename_former(argument) for argument in arguments]
    names = {_OVERRIDE.fullmatch(argument)[2] for argument in arguments}
    if "out" in names and (folder := next((name for name in _FOLDERS if name in names), None)):
        raise UserError(f"{folder} and out both name the folder that is written; give out=DIR alone.")
    # in `--cfg job`, `job` is no override either
    plain = [each.startswith("-") or before in _FLAGS_WITH_VALUE for before, each in pairwise(["", *arguments])]
    pairs = zip(arguments, plain, strict=True)
    return [each if is_plain else _prepare_override(command, kind, each, conf, sweep) for each, is_plain in pairs]


def rename_former(argument: str) -> str:
    """The override with the present names of its key and group entries; each former name is noted on stderr."""
    prefix, key, value = _OVERRIDE.fullmatch(argument).groups()
    present = _say_renamed(key, find_present(key))
    if value is None:
        return f"{prefix or ''}{present}"
    entries = (_say_renamed(entry, FORMER_ENTRIES.get((key, entry))) for entry in value.split(","))  # of a sweep
    return f"{prefix or ''}{present}={','.join(entries)}"


def _say_renamed(former: str, present: str | None) -> str:
    """`present`, after printing a note; `former` if nothing was renamed."""
    if present is None:
        return former
    print(f"note: {former} is now called {present}; the former name will go with the next version.", file=sys.stderr)
    return present


def find_present(key: str) -> str | None:
    """The present name of a renamed dotted key, else None."""
    former = next((name for name in FORMER_KEYS if key == name or key.startswith(f"{name}.")), None)
    return None if former is None else FORMER_KEYS[former] + key[len(former) :]


def name_point_folder(*, _root_: DictConfig) -> str:
    """The folder of one point of a sweep, named by its overrides. If they are too long for a name, or would make a
    folder of their own, it has a part of them and a hash. Resolver of `${point_folder:}`."""
    name = str(_root_.hydra.job.override_dirname)
    plain = name.replace("/", "_")
    if plain == name and len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    room = _LONGEST_NAME - _DIGEST_CHARACTERS - 1
    return f"{plain.encode()[:room].decode(errors='ignore')}-{digest}"


def list_keys(kind: type) -> list[str]:
    """Every dotted key of a command, in the order of its dataclass; a group comes before its keys."""
    return list(_walk(OmegaConf.structured(kind)))


@cache
def list_path_keys(kind: type) -> frozenset[str]:
    """The dotted keys of a command whose values are files or folders: every `path_field` of its dataclass."""
    found: set[str] = set()
    types = get_type_hints(kind)
    for entry in fields(kind):
        if is_path(entry.metadata):
            found.add(entry.name)
        elif is_dataclass(types[entry.name]):
            found |= {f"{entry.name}.{inner}" for inner in list_path_keys(types[entry.name])}
    return frozenset(found)


def list_groups(kind: type, conf: Path) -> dict[str, list[str]]:
    """Configuration group of a command -> names of its entries."""
    own = set(OmegaConf.structured(kind))
    found = {}
    for folder in sorted(path for path in conf.rglob("*") if path.is_dir()):
        name = folder.relative_to(conf).as_posix()
        if name in own or name in ("experiment", "comparison") or name.startswith("hydra/"):
            found[name] = sorted(file.stem for file in folder.glob("*.yaml"))
    return {name: entries for name, entries in found.items() if entries}


def quote_path(argument: str, kind: type, sweep: bool = False) -> str:
    """An override whose value is a path, quoted if Hydra's grammar would read it as something else. `kind`: the
    command's dataclass. `sweep`: a list of points stays a list."""
    key, equals, value = argument.partition("=")
    if not equals or value in ("", "null") or key.lstrip("+") not in list_path_keys(kind):
        return argument
    parsed = _parse(argument)
    if parsed is not None:
        if (sweep and parsed.is_sweep_override()) or value[0] in "'\"":
            return argument
        if not parsed.is_sweep_override() and parsed.value() == value:
            return argument
    # within quotes, backslashes are plain unless a quote follows them
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return f"{key}='" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _prepare_override(command: str, kind: type, argument: str, conf: Path, sweep: bool) -> str:
    prefix, key, value = _OVERRIDE.fullmatch(argument).groups()
    if not key or (value is None and prefix != "~"):
        raise UserError(f"{quote(argument)} is no key=value; `ds-llmpq {command} --help` shows the keys.")
    if _is_group(key, kind, conf):
        return argument
    first, _, others = key.partition(".")
    is_hydra = first == "hydra"
    place = _find_place(_structure(HydraConf if is_hydra else kind), others if is_hydra else key)
    if place is None:
        raise UserError(_explain_unknown(command, kind, key, conf))
    if is_hydra or place == _OPEN or prefix == "~":
        return argument
    if place == _CLOSED:
        return quote_path(f"{key}={value}", kind, sweep)  # with `+`, Hydra would expect a missing key
    return _format_free_override(key.split("."), int(place), value)


@cache
def _structure(kind: type) -> DictConfig:
    """The keys of a dataclass, to look at only."""
    return OmegaConf.structured(kind)


def _is_group(key: str, kind: type, conf: Path) -> bool:
    name = key.partition("@")[0].strip("/")
    if "@" in key or "/" in name or name in ("experiment", "comparison"):
        return True
    # fields first, because any other name may be too long for a file
    return "." not in name and name in _structure(kind) and (conf / name).is_dir()


def _find_place(node: Any, key: str) -> str | None:
    """Where a key is: `_CLOSED` (a field), `_OPEN` (in a list or an untyped value), or the number of its parts that
    name the free dictionary around it. None: there is no such key."""
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return _OPEN if OmegaConf.is_list(node) or node._metadata.ref_type is Any else None
        element = node._metadata.element_type
        if OmegaConf.get_type(node) is not dict:
            if part not in node:
                return None
            node = node._get_node(part)
        elif is_dataclass(element):
            rest = ".".join(parts[depth + 1 :])
            return _OPEN if _find_place(OmegaConf.structured(element), rest) is not None else None
        else:
            return str(depth)
    is_free = isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict
    return str(len(parts)) if is_free and not is_dataclass(node._metadata.element_type) else _CLOSED


def _format_free_override(parts: list[str], depth: int, value: str) -> str:
    """An override of a key in a free dictionary, which the first `depth` parts name. It is always added, with keys
    escaped if Hydra's grammar needs that."""
    plain = f"++{'.'.join(parts)}={value}"
    if _parse(plain) is not None:
        return plain
    try:
        loaded = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return plain  # Hydra says what is wrong with it
    inner = parts[depth:]
    # a device's name may hold dots: in `pins.layers.NAME`, all after the field is the name
    for part in reversed([inner[0], ".".join(inner[1:])] if len(inner) > 1 else inner):
        loaded = {part: loaded}
    return f"++{'.'.join(parts[:depth])}={_format_value(loaded)}"


def _format_value(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, dict):
        pairs = (_SPECIAL.sub(r"\\\1", str(name)) + ":" + _format_value(entry) for name, entry in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_format_value, value)) + "]"
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"
    return json.dumps(value)


def _parse(argument: str) -> Any:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _explain_unknown(command: str, kind: type, key: str, conf: Path) -> str:
    known = [*list_keys(kind), *list_groups(kind, conf), *_FOLDERS]
    near = get_close_matches(key, known, n=1, cutoff=0.7)
    if not near:  # the right name in another group
        last = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == last][:1]
    remedy = f"did you mean {near[0]}?" if near else f"`ds-llmpq {command} --help` shows its keys."
    return f"{quote(key)[1:-1]} is no key of `ds-llmpq {command}`; {remedy}"


def _walk(node: DictConfig, before: str = "") -> Iterator[str]:
    for name in node:
        yield before + name
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and OmegaConf.get_type(inner) is not dict and not inner._is_none():
            yield from _walk(inner, f"{before}{name}.")
