"""`python -m beagle_sd`: the command line, for launchers that take a module."""

from beagle_sd.cli import app

app()
