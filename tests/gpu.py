"""A GPU as a backend of the tests: arguments become torch tensors over copies of the same poisoned memory, with the same
strides, and results come back as NumPy arrays.
"""

import inspect
import itertools

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import torch
from checking import memory_of

import flashgqa
from flashgqa import _C
from flashgqa._bounds import BACKWARD_FACTOR, FORWARD_FACTOR, allowed

BFLOAT16, FLOAT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
# NumPy's name for the bits, torch's for them, torch's for what they mean
FOREIGN = {BFLOAT16: (np.int16, torch.int16, torch.bfloat16), FLOAT8: (np.uint8, torch.uint8, torch.float8_e4m3fn)}
BACKWARD_DEFAULTS = {name: one.default for name, one in inspect.signature(flashgqa.attention_backward).parameters.items()}
SPARSE = 2**30      # bytes from which on an array's address space is not copied, only its elements


def _as_torch(flat):
    flat = np.array(flat)
    if flat.dtype in FOREIGN:
        bits, _, dtype = FOREIGN[flat.dtype]
        return torch.from_numpy(flat.view(bits)).view(dtype)
    return torch.from_numpy(flat)


def _address(x):
    return x.__array_interface__["data"][0]


def put(x, device="cuda"):
    """x on the GPU, in the same storage; torch has no negative strides, so that such an array is moved alone."""
    x = np.asarray(x)
    if x.size == 0 or min(x.strides, default=0) < 0:
        return _as_torch(np.ascontiguousarray(x).reshape(-1)).to(device).view(x.shape)
    strides = [s // x.itemsize for s in x.strides]
    base = memory_of(x)
    if base.nbytes > SPARSE:
        return torch.empty_strided(x.shape, strides, dtype=_as_torch(x[:0].reshape(-1)).dtype, device=device).copy_(
            _as_torch(np.ascontiguousarray(x).reshape(-1)).view(x.shape)
        )
    if base.dtype != x.dtype or not base.flags.c_contiguous:
        base = x = np.ascontiguousarray(x)
        strides = [s // x.itemsize for s in x.strides]
    flat = _as_torch(base.reshape(-1)).to(device)
    return flat.as_strided(x.shape, strides, (_address(x) - _address(base)) // x.itemsize)


def get(t):
    if t is None:
        return None
    t = t.detach().cpu()
    for numpy_dtype, (_, bits, dtype) in FOREIGN.items():
        if t.dtype == dtype:
            return t.contiguous().view(bits).numpy().view(numpy_dtype)
    return t.numpy()


def _write_back(out, t):
    """Everything that the kernel wrote, around the result too, into the memory of `out`."""
    base = memory_of(out)
    if t._base is not None and base.nbytes <= SPARSE and base.dtype == out.dtype and t._base.numel() == base.size:
        base.reshape(-1)[...] = get(t._base)
    else:
        out[...] = get(t)


# Of 16-bit results units_apart() is 1.4 (out), 14 (lse, with ALiBi), 2.1, 1.9 and 1 at most in tests/test_hopper*.py.
UNITS = {"out": 3, "lse": 32, "dq": 4, "dk": 4, "dv": 4, "dbias": 4, "dsink": 4}


def backward_without_dbias(*inputs, dlse=None, **options):
    """attention_backward() as frameworks call it for a bias that asks for no gradient."""
    given = (options.get(name, BACKWARD_DEFAULTS[name]) for name in _C.OPTIONS)
    return flashgqa.Gradients(*_C.backward(*inputs, dlse, False, *given))


def units_apart(got, expected, dtype=None):
    """The largest difference of two tensors, in units of the epsilon of dtype (default: the first one's) times the largest
    element of the row; of rows that are small beside the rest, differences of large numbers, times 1/64 of the largest of all.
    A NaN or inf that one of them lacks is infinitely far.
    """
    a, b = got.double(), expected.to(got.device).double()
    sizes = b.abs().where(b.isfinite(), 0).amax(-1, keepdim=True)
    units = (a - b).abs() / sizes.clamp(min=sizes.max() / 64) / torch.finfo(dtype or got.dtype).eps
    return units.where((a != b) & ~(a.isnan() & b.isnan()), 0).nan_to_num(torch.inf).max().item()


def assert_alike(got, expected, names=("out", "lse"), factor=1, dtype=None):
    """Results that differ by how weights and their gradients round, row by row: `factor` times what two kernels may."""
    for name, a, b in zip(names, got, expected, strict=True):
        apart = units_apart(a, b, dtype)
        assert apart <= factor * UNITS[name], f"{name}: {apart} units"


def equations(dout, q, k, v, causal, narrow, step=1024):
    """out, dq, dk, dv of one sequence and one KV head: k and v [n, d], q and dout of its query heads [h, n, d]. In float64, or
    `narrow` as the plain computation in their dtype has them: sums in float32, weights and their gradients rounded. So many rows
    at a time."""
    exact, scale = torch.float32 if narrow else torch.float64, q.shape[-1] ** -0.5
    store = (lambda x, dtype=q.dtype: x.to(dtype).to(exact)) if narrow else (lambda x: x)
    k, v = k.to(exact), v.to(exact)
    out, dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (dout, q, k, v))
    keys = torch.arange(len(k), device=k.device)
    for h, begin in itertools.product(range(len(q)), range(0, len(k), step)):
        rows = slice(begin, begin + step)
        own, given = q[h, rows].to(exact), dout[h, rows].to(exact)
        x = own @ k.mT * scale
        p = x.masked_fill_(keys > keys[rows, None], -torch.inf).softmax(-1) if causal else x.softmax(-1)
        out[h, rows] = store(p @ v)
        p = store(p)
        ds = store(p * (given @ v.mT - (given * out[h, rows]).sum(-1, keepdim=True))) * scale
        dq[h, rows] = ds @ k
        dk += ds.mT @ own
        dv += p.mT @ given
    return [store(x) for x in (out, dq, dk, dv)]


def within(got, exact, naive, backward):
    """The error rule for one result of equations()."""
    ours, plain, largest = (x.abs().max().item() for x in (got.double() - exact, naive.double() - exact, exact))
    factor = BACKWARD_FACTOR if backward else FORWARD_FACTOR
    return ours <= allowed(plain, largest, str(got.dtype).removeprefix("torch."), factor)


class CudaBackend:
    """variant None: the plan chooses; "general": the smallest kernel of that variant that fits."""

    device = "cuda"

    def __init__(self, variant=None):
        self.variant = variant

    def __repr__(self):
        return "cuda" if self.variant is None else f"cuda-{self.variant}"

    put = staticmethod(put)
    get = staticmethod(get)

    def kernel(self, which, dtype, d, dv):
        if self.variant is None:
            return None
        stem = f"{which}_sm80_{ {'float16': 'f16', 'bfloat16': 'bf16', 'float32': 'f32'}[dtype.name] }_d"
        for row in flashgqa.kernels():
            if row["name"].startswith(stem) and row["name"].endswith(self.variant):
                widths = row["name"].removeprefix(stem).split("_")
                if int(widths[0]) >= d and int(widths[1].removeprefix("dv")) >= dv:
                    return row["name"]
        raise AssertionError(f"no {self.variant} kernel for {stem}{d}")

    @staticmethod
    def check_dtype(dtype):
        if dtype == np.float64:
            if hypothesis.currently_in_test_context():
                hypothesis.reject()      # this example, not the test
            pytest.skip("float64 runs on the CPU only")

    def call(self, function, which, qkv, tensors, options, kernel=None):
        self.check_dtype(qkv[0].dtype)
        options = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        if which is not None:
            kernel = self.kernel(which, qkv[0].dtype, qkv[0].shape[-1], qkv[2].shape[-1])
        return function(*map(put, tensors), **options, kernel=kernel)

    def attention(self, q, k, v, out=None, **options):
        placed = None if out is None else put(out)
        result = self.call(flashgqa.attention, "fwd", (q, k, v), (q, k, v), options | {"out": placed})
        if out is not None:
            _write_back(out, placed)
        first = get(result[0] if isinstance(result, tuple) else result) if out is None else out
        return (first, get(result[1])) if isinstance(result, tuple) else first

    def attention_backward(self, dout, q, k, v, out, lse, **options):
        result = self.call(flashgqa.attention_backward, "bwd", (q, k, v), (dout, q, k, v, out, lse), options)
        return flashgqa.Gradients(*map(get, result))

    def attention_with_kvcache(self, q, k_cache, v_cache, k_new=None, v_new=None, out=None, **options):
        """The caches are written as they are by the CPU, all memory around them included."""
        self.check_dtype(q.dtype)
        options = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        if "rotary" in options:
            options["rotary"] = tuple(map(put, options["rotary"]))
        caches, placed = [put(k_cache), put(v_cache)], None if out is None else put(out)
        added = [None if x is None else put(x) for x in (k_new, v_new)]
        kernel = self.kernel("fwd", q.dtype, q.shape[-1], v_cache.shape[-1])
        result = flashgqa.attention_with_kvcache(put(q), *caches, *added, out=placed, kernel=kernel, **options)
        for x, t in zip((k_cache, v_cache), caches, strict=True):
            _write_back(x, t)
        if out is not None:
            _write_back(out, placed)
        first = get(result[0] if isinstance(result, tuple) else result) if out is None else out
        return (first, get(result[1])) if isinstance(result, tuple) else first

    def attention_weights(self, q, k, **options):
        name = "keysum_any" if "reduce" in options else "rows_any"
        result = self.call(flashgqa.attention_weights, None, (q, k), (q, k), options, self.variant and name)
        if options.get("cu_seqlens_kv") is not None and "max_kv" not in options and result.numel():
            # offsets are not read on the host: the result is as wide as k has rows
            longest = int(np.diff(options["cu_seqlens_kv"]).max(initial=0))
            assert (result[..., longest:] == 0).all()
            result = result[..., :longest]
        return get(result)
