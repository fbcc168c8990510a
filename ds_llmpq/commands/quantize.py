"""`quantize`: writes the model with each decoder layer at its width, so that each rank reads only its own part."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.commands.config import QuantizeConfig
from ds_llmpq.errors import UserError
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import check_model, read_plan
from ds_llmpq.quant.config import QuantConfig, suit_zeros
from ds_llmpq.quant.packing import count_bits_per_weight, make_groups
from ds_llmpq.wording import format_size, pluralize, quote_argument


def run(settings: QuantizeConfig, out: Path) -> int:
    source, bits, quant = choose_widths(settings)
    from ds_llmpq.quant.writer import write_quantized  # after the cheap checks: it brings torch

    reuse = config.make_absolute(settings.reuse) if settings.reuse else None
    with closing(ProgressBar()) as bar:
        show = partial(bar.show, "quantize")
        trusts = settings.model.trust_remote_code
        written = write_quantized(source, out, bits, quant, settings.device, reuse, show, trusts)
    weight = count_bits_per_weight(read_shape(source), bits, make_groups(quant), quant.lm_head_bits)
    print(
        f"{pluralize(written.parts, 'part')}, {written.reused} of them reused; {format_size(written.source_bytes)} "
        f"became {format_size(written.bytes)} in {written.seconds:.1f} s; {weight:.2f} bits per weight in decoder "
        f"layers and lm_head, with scales and zeros of 16 bits"
    )
    print(f"quantized: {out} (use it with `ds-llmpq run plan=FILE {quote_argument('quantized', out)}`)")
    return 0


def choose_widths(settings: QuantizeConfig) -> tuple[Path, list[int], QuantConfig]:
    """(full-precision checkpoint, a width for each layer, HQQ settings), from the plan or from `widths`."""
    if (settings.plan is None) == (settings.widths is None):
        raise UserError("quantize needs either plan=FILE or widths=[...], one width for all layers or one per layer.")
    if settings.widths is not None:
        if settings.model.path is None:
            raise UserError("quantize needs weights; give model.path=DIR.")
        path = config.make_absolute(settings.model.path)
        layers = read_shape(path).layers
        widths = list(settings.widths) * (layers if len(settings.widths) == 1 else 1)
        return path, widths, suit_zeros(settings.quant, settings.device)
    plan = read_plan(config.make_absolute(settings.plan))
    planned = plan.model_path
    if plan.quant is None:
        raise UserError(f"{settings.plan} was made from plain data and names no HQQ settings; plan with model.path.")
    path = Path(planned) if planned and Path(planned).is_dir() else config.make_absolute(settings.model.path or "")
    check_model(plan, path)
    return path, [width for stage in plan.stages for width in stage.bits], plan.quant.to_config()
