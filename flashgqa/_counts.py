"""Whole numbers as arguments."""

from operator import index


def whole(name, value):
    """The int that an argument is; an error that names it if it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: it must be an integer") from None


def count(name, value, least=0, most=None):
    """The same of a number in a range."""
    number = whole(name, value)
    if number < least:
        raise ValueError(f"{name} is {number}: it must be {least} or more")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}: it must be {most} or less")
    return number
