"""What runs on the device: the decode state, prefill and decode steps, sampling, compilation."""
