"""`python -m ds_llmpq VERB` is `ds-llmpq VERB`."""

from ds_llmpq.cli import main

main()
