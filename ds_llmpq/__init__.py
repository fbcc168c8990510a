"""Serve large language models offline on unlike devices, with a plan that can be trusted."""

__version__ = "0.1.0"
