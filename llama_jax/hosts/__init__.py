"""Several processes, on one host or more, that run one model together."""
