"""A stage reads its own pipeline layers; how one layer is read is `quant.layers`' subject."""

from ds_llmpq.quant.layers import LayerLoader as StageLoader

__all__ = ["StageLoader"]
