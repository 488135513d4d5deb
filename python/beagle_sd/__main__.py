"""`python -m beagle_sd`: the command line, for launchers that take a module."""

from beagle_sd.cli.app import app

app()
