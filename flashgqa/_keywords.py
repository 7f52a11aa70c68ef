"""What makes flashgqa.attention a function of C: its thirty keywords cost more in Python than all that C asks of its arrays."""

from . import _C


def in_c(attention):
    """A function with the signature and the documentation of `attention`, which answers what it does not know."""
    keywords = ", ".join(f"{name}={value!r}" for name, value in attention.__kwdefaults__.items())
    return _C.keyword_attention(attention, f"attention(q, k, v, *, {keywords})\n--\n\n{attention.__doc__}")
