"""Bytes: measured, and in words."""

import sys

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory():
    """Most bytes of memory that this process has had, or None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gib(count):
    return f"{count / 2**30:6.2f} GiB"
