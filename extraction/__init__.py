"""Writes the K/V of a dataset to a .pt file or a store (`kvdistill extract`)."""
