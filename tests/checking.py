"""How results are judged: the error rule (flashgqa/_bounds.py), hostile storage for inputs, guarded storage for results."""

import dataclasses

import ml_dtypes
import numpy as np
from hypothesis import given, settings

from flashgqa._bounds import EPSILON as EPSILON_OF
from flashgqa._bounds import Naive, accumulator, exact, judge, naive_backward, naive_forward, naive_weights

# Of those imported, what other tests take from here.
__all__ = ["EPSILON_OF", "Naive", "accumulator", "exact", "naive_backward", "naive_forward", "naive_weights"]

DTYPES = {name: np.dtype(getattr(np, name)) for name in ("float64", "float32", "float16")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def assert_within(name, got, expected, naive, dtype, factor):
    """The error rule for one result."""
    problem = judge(got, expected, naive, dtype, factor).problem
    assert problem is None, f"{name}: {problem}"


# ---- storage ----

GUARD = 67  # elements before and after; odd, so that nothing is aligned by luck


def fill_value(dtype):
    return True if dtype.kind == "b" else np.iinfo(dtype).max if dtype.kind in "iu" else np.nan


def place(x, how="contiguous"):
    """x in poisoned memory: all bytes around (and between) its elements are NaN, or True for masks.

    contiguous | sliced (gaps in every axis) | negative (all but the last axis run backwards) | transposed (axes but the last
    stored in reverse order) | broadcast (stride 0 in the first axis: its first entry counts) | gaps (last axis strided by 2)
    | (order, gaps, flips): any order of the axes in memory, slowest first, elements left out after each, runs backwards.
    """
    x = np.asarray(x)
    fill = fill_value(x.dtype)
    if not isinstance(how, str):
        order, gaps, flips = ([n for n in how[0] if n < x.ndim], how[1], how[2])
        flip = tuple(slice(None, None, -1 if flips[n] else 1) for n in range(x.ndim))
        padded = np.full([x.shape[n] + 2 * gaps[n] for n in order], fill, x.dtype)
        stored = padded[tuple(slice(gaps[n], gaps[n] + x.shape[n]) for n in order)]
        view = stored.transpose(np.argsort(order))[flip]
        view[...] = x
        return view
    if how == "contiguous":
        flat = np.full(x.size + 2 * GUARD, fill, x.dtype)
        view = flat[GUARD : GUARD + x.size].reshape(x.shape)
    elif how == "sliced":
        padded = np.full([n + 3 for n in x.shape], fill, x.dtype)
        view = padded[tuple(slice(1, 1 + n) for n in x.shape)]
    elif how == "negative":
        flip = (slice(None, None, -1),) * (x.ndim - 1)
        return place(x[flip], "sliced")[flip]
    elif how == "transposed":
        order = (*reversed(range(x.ndim - 1)), x.ndim - 1)
        return place(x.transpose(order), "sliced").transpose(order)
    elif how == "broadcast":
        return np.broadcast_to(place(x[:1]), x.shape)
    elif how == "gaps":
        doubled = np.full((*x.shape[:-1], 2 * x.shape[-1]), fill, x.dtype)
        doubled[..., ::2] = x
        return place(doubled)[..., ::2]
    else:
        raise ValueError(how)
    view[...] = x
    return view


def memory_of(x):
    """The whole buffer that an array is a view of."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


class Guarded:
    """Storage for a result: NaN in it and around it. `check()` after the call: nothing outside the view was written."""

    def __init__(self, shape, dtype, how="contiguous"):
        self.array = place(np.full(shape, np.nan, dtype), how)
        self.memory = memory_of(self.array)
        self.before = self.memory.tobytes()

    def check(self):
        result = self.array.copy()
        self.array[...] = np.nan
        assert self.memory.tobytes() == self.before, "memory outside the result was written"
        self.array[...] = result


def fields_without_variety(cases, kind, examples):
    """Names of the fields of a dataclass that have one value in all of so many examples of a strategy."""
    seen = {field.name: set() for field in dataclasses.fields(kind)}

    @given(case=cases)
    @settings(max_examples=examples)
    def collect(case):
        for name, values in seen.items():
            values.add(getattr(case, name))

    collect()
    return [name for name, values in seen.items() if len(values) < 2]


def same_bits(a, b):
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())


def memory_bytes(*arrays):
    return [memory_of(x).tobytes() for x in arrays if x is not None]
