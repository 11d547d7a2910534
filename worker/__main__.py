"""`python -m worker`: the same as the console script `worker`."""

from worker.cli import main

main()
