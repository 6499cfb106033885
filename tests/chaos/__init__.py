"""Training under random faults: `make chaos`."""
