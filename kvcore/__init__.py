"""The contract between the processes: plan, tensors and codecs, wire format, store, errors and configuration."""
