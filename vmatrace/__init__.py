"""Shows what the Linux kernel decides about memory maps: merges, splits, and the rule behind each."""

__version__ = "0.1.0"
