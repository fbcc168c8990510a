"""Configuration group `run`: supervision."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.errors import UserError

ON_LOSS = ("stop", "replan")


@dataclass
class WatchConfig:
    """When a pipeline counts as hanging."""

    hang_seconds: float = 900.0  # a pipeline without progress for so long is ended, which counts as a death


@dataclass
class SupervisionConfig(WatchConfig):
    """What `run` does if the pipeline fails."""

    restarts: int = 3  # restarts in a row without a new result
    backoff_seconds: float = 5.0  # before the first restart; doubled each time, at most 300
    grace_seconds: float = 60.0  # for requests in flight after a first Ctrl-C or SIGTERM; a second one ends at once
    on_loss: str = "stop"  # stop | replan: if a host or GPU does not come back, end, or plan for the rest


def validate_supervision(settings: WatchConfig) -> None:
    """`UserError` for a value out of range."""
    for name, low in (("restarts", 0), ("backoff_seconds", 0), ("hang_seconds", 5), ("grace_seconds", 0)):
        if not low <= (value := getattr(settings, name, low)) < float("inf"):
            raise UserError(f"run.{name} is {value} but must be at least {low} and finite.")
    if (chosen := getattr(settings, "on_loss", "stop")) not in ON_LOSS:
        raise UserError(f"run.on_loss is {chosen!r} but must be one of {', '.join(ON_LOSS)}.")
