"""Checks that a checkpoint is the one that a plan was made for."""

from pathlib import Path

from ds_llmpq.errors import UserError
from ds_llmpq.models.description import refuse_foreign
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.plan.plan import Plan
from ds_llmpq.plan.plan_parts import Quantization
from ds_llmpq.quant.recipe import read_recipe


def check_model(plan: Plan, model_path: str | Path) -> None:
    """`UserError` if the checkpoint is not the one the plan was made for, or quantized otherwise than the plan says."""
    refuse_foreign(model_path)
    planned = plan.model.fingerprint if plan.model else None
    try:
        found = fingerprint(model_path)
    except OSError as error:
        raise UserError(f"Model {model_path} cannot be read ({error.strerror}); give model.path=DIR.") from None
    if planned != found:
        raise UserError(
            f"The plan was made for a model with fingerprint {str(planned)[:12]}, but {model_path} has {found[:12]}; "
            "plan again for this model, or give the planned one as model.path."
        )
    if recipe := read_recipe(model_path):
        bits = [width for stage in plan.stages for width in stage.bits]
        recipe.check(model_path, bits, (plan.quant or Quantization()).to_config())
