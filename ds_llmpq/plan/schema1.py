"""Plans of schema 1, read for one more version: what launching needs was a list of its own beside the stages."""

from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.validation import Plain, validate

_REMEDY = "plan again"
_MODEL = ("path", "architecture", "fingerprint")
_OF_STAGE = ("kind", "slot", "threads", "cpu_share")


def upgrade(obj: dict[str, Any]) -> dict[str, Any]:
    """The object in the form of schema 2, whose reader then checks the values. `UserError`: `engine` and `stages` do
    not fit together."""
    obj = dict(obj)
    engine = obj.pop("engine", None)
    if isinstance(obj.get("model"), dict):
        obj["model"] = {"path": None} | {name: obj["model"][name] for name in _MODEL if name in obj["model"]}
    if engine is None:
        return obj
    engine = validate(Plain, engine, "plan.engine", _REMEDY)
    stages = validate(list[Plain], obj.get("stages"), "plan.stages", _REMEDY)
    launched = validate(list[Plain], engine.get("stages"), "plan.engine.stages", _REMEDY)
    if len(stages) != len(launched):
        raise UserError(f"plan.stages has {len(stages)} entries, but plan.engine.stages {len(launched)}; {_REMEDY}.")
    obj["deployment"] = {"compute_dtype": engine.get("dtype")} | {n: engine.get(n) for n in ("env", "link_seconds")}
    obj["stages"] = [
        stage | {name: own[name] for name in _OF_STAGE if name in own}
        for stage, own in zip(stages, launched, strict=True)
    ]
    return obj
