"""Sequence-based fraud scoring: the domain, free of torch except in `seqfraud.nn`."""

__version__ = "0.1.0"
