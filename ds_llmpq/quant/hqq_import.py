"""HQQ for a process that is ours alone."""

import torch


def import_hqq() -> None:
    """Imports HQQ without torch's compiler, which its three decorated methods would load: half of what a rank imports,
    and nothing calls them. They stay uncompiled, so this is not for a user's own process."""
    compiler = torch.compile
    torch.compile = lambda: lambda method: method
    try:
        import hqq.core.quantize  # noqa: F401
    finally:
        torch.compile = compiler
