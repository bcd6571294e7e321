"""posttrain: one config, one loop, every score with its interval."""

__version__ = "0.1.0"
