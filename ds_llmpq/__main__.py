"""`python -m ds_llmpq COMMAND` is `ds-llmpq COMMAND`."""

from ds_llmpq.cli import main

main()
