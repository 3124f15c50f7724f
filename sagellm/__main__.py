"""`python -m sagellm` is the command `sagellm`."""

from sagellm.cli import main

main(prog_name="sagellm")
