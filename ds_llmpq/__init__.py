"""Serve large language models offline on heterogeneous devices, with a plan that can be trusted."""

__version__ = "0.1.0"
