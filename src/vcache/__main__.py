"""`python -m vcache`: the same as the console script `vcache`."""

from .cli import main

main()
