"""Runs that survive: what is saved of a training, how it is told to stop, and where the same command goes on."""
