"""One program per file, each in a process of its own, all speaking `protocol`."""
