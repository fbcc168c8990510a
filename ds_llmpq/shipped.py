"""Finds the files that the project ships: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq.errors import UserError

_PACKAGE = Path(__file__).parent
# name in `${asset:NAME}` -> place in a checkout, place in an installed wheel
_ASSETS = {
    "tiny-llama": ("tests/assets/tiny-llama", "assets/tiny_llama"),
    "demo_prompts.jsonl": ("launch/demo_prompts.jsonl", "assets/launch/demo_prompts.jsonl"),
}


def conf_folder() -> Path:
    """The configuration folder."""
    checkout = _PACKAGE.parent / "conf"
    return checkout if checkout.is_dir() else _PACKAGE / "conf"


def asset(name: str) -> str:
    """Path of a file or folder that the project ships."""
    if name not in _ASSETS:
        raise UserError(f"${{asset:{name}}} is unknown; known are {', '.join(sorted(_ASSETS))}.")
    checkout, installed = _ASSETS[name]
    found = _PACKAGE.parent / checkout
    return str(found if found.exists() else _PACKAGE / installed)
