"""`sensitivity`: what each layer loses at each width, in nats per token, as omega.json."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq import config
from ds_llmpq.commands.config import SensitivityConfig
from ds_llmpq.errors import UserError
from ds_llmpq.launch.progress import ProgressBar
from ds_llmpq.report.plan_table import size, table
from ds_llmpq.sensitivity.omega import Omega, write_omega


def run(settings: SensitivityConfig, out: Path) -> int:
    if settings.model.path is None:
        raise UserError("sensitivity needs weights; give model.path=DIR.")
    import torch

    from ds_llmpq.sensitivity.make import Request, make_omega

    out.mkdir(parents=True, exist_ok=True)
    if settings.calibration.text is not None:
        settings.calibration.text = str(config.absolute(settings.calibration.text))
    bar = ProgressBar()
    try:
        omega = make_omega(
            Request(
                config.absolute(settings.model.path),
                settings.method,
                settings.quant,
                settings.calibration,
                settings.seed,
                torch.device(settings.device),
                out,
                bar.show,
                settings.model.trust_remote_code,
            )
        )
    finally:
        bar.close()
    write_omega(out / "omega.json", omega)
    for file in out.glob("progress.*"):
        file.unlink()
    print(omega_table(omega))
    for width, loss in omega.head.items():
        print(f"output matrix at {width} bits: {loss:.2e}")
    details = omega.details
    print(
        f"{omega.method}: {details['indicator_seconds']:.1f} s, and {details['calibration_seconds']:.1f} s to measure "
        f"the whole model at each width; {details['tokens']} tokens of {details['text']}; peak memory "
        f"{size(details['peak_memory_bytes'])}"
    )
    print(f"omega: {out / 'omega.json'} (use it with `ds-llmpq plan planner.omega={out / 'omega.json'}`)")
    return 0


def omega_table(omega: Omega) -> str:
    """Nats per token by layer and width, and their sums."""
    rows = [[str(layer), *(f"{value:.2e}" for value in row)] for layer, row in enumerate(omega.table)]
    rows.append(["all", *(f"{sum(column):.2e}" for column in zip(*omega.table, strict=True))])
    return table(["layer", *(f"{width} bits" for width in omega.bits)], rows)
