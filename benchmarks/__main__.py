"""`python -m benchmarks NAME [flags]`, or `--list`."""

from benchmarks.registry import main

main()
