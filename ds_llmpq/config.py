"""From the command line to plain objects: composes settings, reads YAML files, and explains mistakes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, ValidationError
from yaml import YAMLError

from ds_llmpq import overrides
from ds_llmpq.cluster.cluster_file import describe_devices
from ds_llmpq.cluster.config import DETECTED, ClusterConfig, DeviceTypeConfig
from ds_llmpq.cluster.detect import (
    computes_bfloat16,
    count_usable_cores,
    detect,
    list_free_slots,
    processor_name,
    query_gpus,
)
from ds_llmpq.cluster.rates import recall_rates
from ds_llmpq.commands.config import (
    DetectConfig,
    ExportConfig,
    MergeConfig,
    PlanCommandConfig,
    ProfileConfig,
    QuantizeConfig,
    ReportConfig,
    SensitivityConfig,
)
from ds_llmpq.errors import UserError, first_line, quote
from ds_llmpq.files import absolute_or_none, make_absolute, read_yaml
from ds_llmpq.launch.environment import check_environment
from ds_llmpq.lengths.config import LengthsConfig
from ds_llmpq.research.config import SimulateConfig, find_published_model
from ds_llmpq.serving.config import EvaluateConfig, PlanConfig, PlanningConfig, RunConfig, ServeConfig
from ds_llmpq.shipped import asset, conf_folder

COMMANDS = {
    "detect": DetectConfig,
    "merge": MergeConfig,
    "plan": PlanCommandConfig,
    "serve": ServeConfig,
    "run": RunConfig,
    "lengths": LengthsConfig,
    "simulate": SimulateConfig,
    "profile": ProfileConfig,
    "report": ReportConfig,
    "quantize": QuantizeConfig,
    "sensitivity": SensitivityConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}

# what a command runs if it gets no arguments, or only an output folder
EXAMPLES = {"run": ("+experiment=demo",)}

__all__ = ["absolute_or_none", "asset", "conf_folder", "make_absolute"]  # beside what is defined here

T = TypeVar("T")
P = TypeVar("P", PlanConfig, RunConfig, EvaluateConfig, ProfileConfig)


def register(command: str | None = None) -> None:
    """Registers the resolvers with OmegaConf and the schema of a command with Hydra, which copies all it knows for each
    composition. May be called again."""
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    OmegaConf.register_new_resolver("gib", lambda number: int(float(number) * 2**30), replace=True)
    OmegaConf.register_new_resolver("mib", lambda number: int(float(number) * 2**20), replace=True)
    OmegaConf.register_new_resolver("point_folder", overrides.name_point_folder, replace=True)
    OmegaConf.register_new_resolver("published_model", find_published_model, replace=True)
    store = ConfigStore.instance()
    if command in COMMANDS and f"{command}_schema.yaml" not in store.repo:
        store.store(name=f"{command}_schema", node=COMMANDS[command])


def compose_settings(command: str, arguments: list[str]) -> DictConfig:
    """The configuration of a command, without running it. `UserError`: an unknown key or a wrong value."""
    composed, _ = compose_job(command, prepare(command, arguments))
    with open_dict(composed):
        del composed["hydra"]
    return composed


def compose_job(command: str, prepared: list[str]) -> tuple[DictConfig, ConfigLoader]:
    """The configuration with Hydra's own node, and what it was loaded by. `prepared`: of `prepare`."""
    register(command)
    try:
        with initialize_config_dir(str(conf_folder()), job_name=command, version_base="1.3"):
            composed = compose(config_name=command, overrides=prepared, return_hydra_config=True)
            return composed, GlobalHydra.instance().config_loader()
    except Exception as error:  # Hydra raises ValueError, AssertionError and others for mistakes in overrides
        raise UserError(f"Configuration of {command}: {_sentence(error)}") from None


def prepare(command: str, arguments: list[str], sweep: bool = False) -> list[str]:
    """A command's arguments in Hydra's form; see `overrides.prepare`."""
    return overrides.prepare(command, COMMANDS[command], arguments, conf_folder(), sweep)


def to_object(config: DictConfig, kind: type[T]) -> T:
    """The plain object of a composed configuration. `UserError`: a missing value or a wrong type."""
    try:
        result: Any = OmegaConf.to_object(config)
    except Exception as error:  # beside OmegaConf's own, whatever a resolver or a conversion raises
        raise UserError(f"Configuration: {_sentence(error)}") from None
    if not isinstance(result, kind):
        raise UserError(f"Configuration is not of the form {kind.__name__}; start it through `ds-llmpq`.")
    return result


class _DeviceTypes(Mapping[str, DeviceTypeConfig]):
    """Those of a folder by name, each read when it is first looked up: there are many, and few are needed."""

    def __init__(self, folder: Path):
        self._files = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
        self._read: dict[str, DeviceTypeConfig] = {}

    def __getitem__(self, name: str) -> DeviceTypeConfig:
        if name not in self._read:
            self._read[name] = _read_typed(self._files[name], DeviceTypeConfig)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_device_types() -> Mapping[str, DeviceTypeConfig]:
    """The device types of conf/device by name."""
    return _DeviceTypes(conf_folder() / "device")


def choose_cluster(settings: PlanningConfig | ProfileConfig) -> ClusterConfig:
    """The entry of the cluster group (for `cluster=auto`, what is detected now), or the file given instead. The file
    may set only listed variables for the ranks, and those that the command line asks for too."""
    if settings.cluster_file is None:
        return _detect_cluster() if _is_to_detect(settings) else settings.cluster
    file = make_absolute(settings.cluster_file)
    found = read_cluster(file)
    check_environment(found.env, settings.cluster.env, f"cluster_file={file}")
    return found


def load_cluster(settings: P) -> P:
    """`settings` with the cluster that its file describes, and the command line's variables for the ranks. If a plan or
    a problem is given, nothing is detected, unless the run may have to plan around lost devices."""
    if settings.cluster_file is None and (not _is_to_detect(settings) or _needs_no_cluster(settings)):
        return settings
    found = choose_cluster(settings)
    return replace(settings, cluster=replace(found, env=found.env | settings.cluster.env), cluster_file=None)


def _is_to_detect(settings: PlanningConfig | ProfileConfig) -> bool:
    return settings.cluster.name == DETECTED and not settings.cluster.hosts


def _needs_no_cluster(settings: PlanningConfig | ProfileConfig) -> bool:
    plan, problem = getattr(settings, "plan", None), getattr(settings, "problem", None)
    return bool(problem or (plan and getattr(settings.run, "on_loss", None) != "replan"))


def _detect_cluster() -> ClusterConfig:
    """This host's GPUs, or its processor as one stage; a line on stderr says which. The rates of the processor, and of
    GPUs of unknown type, are measured once and kept."""
    known, gpus, cores = read_device_types(), query_gpus(), count_usable_cores()
    slots, rates = list_free_slots(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")), None
    if not slots and (rates := recall_rates("cpu", cores, f"{processor_name()}, {cores} threads")) is None:
        rates = {"flops_per_second": dict(known["cpu_core"].flops_per_second)}
        if not computes_bfloat16():
            rates["flops_per_second"].pop("bfloat16")
    found = detect(
        known,
        gpus=gpus,
        cpu_rates=rates,
        measure_gpu=lambda slot: recall_rates("cuda", slot, gpus[slot].name),
        slots=slots,
    )
    left = (
        f"; {len(gpus) - len(slots)} GPUs are full or hidden by CUDA_VISIBLE_DEVICES" if len(slots) < len(gpus) else ""
    )
    print(f"cluster=auto: {describe_devices(found)}{left}", file=sys.stderr)
    return parse_cluster(found | {"name": DETECTED})


def read_cluster(file: Path) -> ClusterConfig:
    """A cluster.yaml, with the types of conf/device that its devices name and it does not describe. `UserError`:
    unreadable, unknown key, wrong type."""
    found, known = _read_typed(file, ClusterConfig), read_device_types()
    named = dict.fromkeys(device.type for host in found.hosts for device in host.devices)
    shipped = {name: known[name] for name in named if name in known and name not in found.device_types}
    return replace(found, device_types=found.device_types | shipped)


def parse_cluster(values: Mapping[str, Any]) -> ClusterConfig:
    """The keys of a cluster.yaml as an object. `UserError`: unknown key, wrong type."""
    register()
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), _to_integers(dict(values))))
    except Exception as error:  # OmegaConf's own, or whatever a conversion raises
        raise UserError(f"cluster: {_describe_wrong_key(error)}") from None


def _read_typed(file: Path, kind: type[T]) -> T:
    """A YAML file as an object of `kind`. `UserError`: unreadable, unknown key, wrong type."""
    register()
    values = _to_integers(read_yaml(file, "YAML file", "give a YAML file as `detect` writes it"))
    if kind is ClusterConfig and isinstance(values, dict) and "defaults" in values:
        values = _with_defaults(values, file)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), values)
        return OmegaConf.to_object(merged)
    except ValidationError as error:
        raise UserError(f"{file}: {_describe_wrong_key(error)}") from None
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({_name_key(error)}{first_line(error)}); give a YAML file as `detect` writes it."
        ) from None
    except Exception as error:  # OmegaConf's own, or whatever a conversion raises
        raise UserError(f"{file}: {_describe_wrong_key(error)}") from None


def _describe_wrong_key(error: Exception) -> str:
    """A key that is not there, with the one that was meant; for sizes, how they are written."""
    kind, key = getattr(error, "object_type", None), str(getattr(error, "key", ""))
    if isinstance(error, ConfigKeyError) and is_dataclass(kind):
        known = [entry.name for entry in fields(kind)]
        near = get_close_matches(key, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the keys there are {', '.join(known)}."
        return f"{_name_key(error)}there is no such key; {remedy}"
    text = f"{_name_key(error)}{_sentence(error)}"
    if isinstance(error, ValidationError) and key.endswith("_bytes"):
        text = text.rstrip(".") + '; give a number of bytes, such as 24e9 or "${gib:24}".'
    return text


def _to_integers(value: Any) -> Any:
    """Turns whole numbers written as floats (`24e9` bytes) into integers, which fields of floats accept too."""
    if isinstance(value, dict):
        return {name: _to_integers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_to_integers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _with_defaults(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """For a copy of an entry of conf/cluster: reads its `defaults`, Hydra's list of device types, as Hydra would; the
    file's own keys override them."""
    values = dict(values)
    types: dict[str, Any] = {}
    for entry in values.pop("defaults") or []:
        if entry == "_self_":
            continue
        [(place, name)] = entry.items() if isinstance(entry, dict) and len(entry) == 1 else [(entry, None)]
        found = re.fullmatch(r"/?device@device_types\.([\w-]+)", str(place))
        device = conf_folder() / "device" / f"{name}.yaml"
        if not found or not isinstance(name, str) or name != device.stem or not device.is_file():
            known = ", ".join(sorted(path.stem for path in (conf_folder() / "device").glob("*.yaml")))
            raise UserError(
                f"{file}: defaults holds {quote(entry)}, but may hold `_self_` and `/device@device_types.NAME: TYPE`, "
                f"with a TYPE of {known}."
            )
        types[found[1]] = _to_integers(read_yaml(device, "device type", "install the package again"))
    own = values.get("device_types") or {}
    if isinstance(own, dict):
        merged = {
            name: types.get(name, {}) | entry if isinstance(entry, dict) else entry for name, entry in own.items()
        }
        values["device_types"] = types | merged
    return values


def _name_key(error: Exception) -> str:
    """The key that an error of OmegaConf's is about."""
    key = getattr(error, "full_key", None)
    return f"{key}: " if key else ""


_NO_LIST = re.compile(r"Error merging override (\S+?)=(\S+); Invalid value assigned: \w+ is not a ListConfig.*")


def _sentence(error: Exception) -> str:
    """One sentence from Hydra's and OmegaConf's messages of many lines, of which the first say what is wrong. If one of
    our own errors caused it, as in a resolver, its message is enough."""
    within: BaseException | None = error
    while within := within.__cause__ or within.__context__:
        if isinstance(within, UserError):
            return str(within)
    cause = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()][:1]
    noise = ("full_key", "object_type", "reference_type", "Set the env", "Config search path", "provider=")
    kept = [line for line in lines if not line.startswith(noise)]
    text = "; ".join(dict.fromkeys(line.rstrip(".") for line in kept[:40]))
    text = _NO_LIST.sub(r"\1=\2 must be a list, as \1=[\2]", text)
    # Hydra lists a group's entries one a line
    head, listing, entries = text.partition("Available options in ")
    if listing:
        group, _, names = entries.partition(":; ")
        text = f"{head}Available in {group} are {names.replace('; ', ', ')}"
    return (text or type(error).__name__) + "."
