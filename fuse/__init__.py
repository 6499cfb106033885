"""Fuses the aligned K/V of several teachers into one target."""
