"""`sensitivity`: estimates what each layer loses at each width, in nats per token; writes sensitivity.json."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ds_llmpq import config
from ds_llmpq.commands.config import SensitivityConfig
from ds_llmpq.errors import UserError
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.sensitivity.table import FILE, Sensitivity, write_sensitivity
from ds_llmpq.wording import format_number, format_size, quote_argument


def run(settings: SensitivityConfig, out: Path) -> int:
    if settings.model.path is None:
        raise UserError("sensitivity needs weights; give model.path=DIR.")
    import torch

    from ds_llmpq.sensitivity.make import SensitivityRequest, make_sensitivity

    out.mkdir(parents=True, exist_ok=True)
    if settings.calibration.text is not None:
        settings.calibration.text = str(config.make_absolute(settings.calibration.text))
    with closing(ProgressBar()) as bar:
        request = SensitivityRequest(
            config.make_absolute(settings.model.path),
            settings.method,
            settings.quant,
            settings.calibration,
            settings.seed,
            torch.device(settings.device),
            out,
            bar.show,
            settings.model.trust_remote_code,
        )
        sensitivity = make_sensitivity(request)
    write_sensitivity(file := out / FILE, sensitivity)
    for left in out.glob("progress.*"):
        left.unlink()
    print(format_losses(sensitivity))
    for width, loss in sensitivity.head.items():
        print(f"lm_head at {width} bits: {format_number(loss)} nats per token")
    details = sensitivity.details
    print(
        f"{sensitivity.method}: {details['indicator_seconds']:.1f} s, and {details['calibration_seconds']:.1f} s to "
        f"measure the whole model at each width; {details['tokens']:,} tokens of {details['text']}; peak memory "
        f"{format_size(details['peak_memory_bytes'])}"
    )
    print(f"sensitivity: {file} (use it with `ds-llmpq plan {quote_argument('planner.sensitivity', file)}`)")
    return 0


def format_losses(sensitivity: Sensitivity) -> str:
    """Nats per token by layer and width, and their sums."""
    rows = [[str(layer), *(format_number(value) for value in row)] for layer, row in enumerate(sensitivity.table)]
    rows.append(["all", *(format_number(sum(column)) for column in zip(*sensitivity.table, strict=True))])
    return format_table(["layer", *(f"{width} bits" for width in sensitivity.bits)], rows)
