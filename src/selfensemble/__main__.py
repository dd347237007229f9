"""`python -m selfensemble`."""

from .cli import main

main()
