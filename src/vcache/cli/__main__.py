"""`python -m vcache.cli`: the same as the console script `vcache`."""

from . import main

main()
