"""Serve large language models offline on unlike devices, with a plan that can be trusted."""

__version__ = "0.1.0"

from ds_llmpq import quick_imports

quick_imports.install()
