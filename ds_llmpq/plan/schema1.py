"""Plans of schema 1, read for one more version: what launching needs lay in a list of its own beside the stages."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from ds_llmpq.cluster.devices import COMPUTE_DTYPES, KINDS
from ds_llmpq.errors import UserError
from ds_llmpq.validation import Count, Many, PathText, Plain, Positive, Table, one_of, validate

_REMEDY = "plan again"
_MODEL = ("path", "architecture", "fingerprint")


@dataclass(frozen=True)
class _EngineStage:
    kind: one_of(*KINDS)
    slot: Count
    threads: Positive | None = None
    cpu_share: Annotated[float, Ge(0.05), Le(1)] | None = None


@dataclass(frozen=True)
class _Engine:
    dtype: one_of(*COMPUTE_DTYPES)
    stages: Many[_EngineStage]
    env: Table[PathText]
    link_seconds: Any = field(default=None)


def upgrade(obj: dict[str, Any]) -> dict[str, Any]:
    """The object as schema 2 has it. What is the same in both is left to be read as schema 2. `UserError`: `engine` is
    not what schema 1 had."""
    obj = dict(obj)
    engine = obj.pop("engine", None)
    if isinstance(obj.get("model"), dict):
        obj["model"] = {"path": None} | {name: obj["model"][name] for name in _MODEL if name in obj["model"]}
    if engine is None:
        return obj
    read = validate(
        _Engine, validate(Plain, engine, "plan.engine", _REMEDY), "plan.engine", _REMEDY, ignore_unknown=True
    )
    obj["deployment"] = {"compute_dtype": read.dtype, "env": read.env, "link_seconds": read.link_seconds}
    stages = obj.get("stages")
    if not isinstance(stages, list) or len(stages) != len(read.stages) or not all(isinstance(s, dict) for s in stages):
        raise UserError("plan.stages and plan.engine.stages must be lists of as many objects; plan again.")
    obj["stages"] = [{**stage, **asdict(own)} for stage, own in zip(stages, read.stages, strict=True)]
    return obj
