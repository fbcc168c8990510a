"""A micro-batch through the layers of one stage: split where memory runs out, without the rows it cannot run."""
