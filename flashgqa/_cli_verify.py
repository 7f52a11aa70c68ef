"""``python -m flashgqa verify``: every kernel of this machine, in every dtype, against the float64 equations.

Of each call: the error of every result by the rule of `_bounds`; the same bits from a second call, and from one thread as
from several; inputs that lie between NaNs, an ``out`` between NaNs, and no byte written but the results'.
"""

import sys
from typing import NamedTuple

import numpy as np

import flashgqa

from . import _bounds, reference
from ._progress import Progress

DTYPES = ("float64", "float32", "float16", "bfloat16")
GUARD = 67  # elements of poison before and after an array; odd, so that nothing is aligned by luck


class Case(NamedTuple):
    name: str
    b: int
    hq: int
    hk: int
    sq: int
    sk: int
    d: int
    dv: int
    options: dict = {}  # as attention takes them; of arrays, a word for `build`


CASES = (
    Case("dense, MHA", 2, 4, 4, 45, 70, 64, 64),
    Case("causal, GQA", 1, 8, 2, 130, 130, 64, 64, {"causal": True}),
    Case("causal, MQA, odd dims", 1, 7, 1, 33, 129, 41, 23, {"causal": True}),
    Case("one query", 2, 8, 2, 1, 300, 128, 128),
    Case("head dim 256", 1, 2, 1, 9, 40, 256, 256, {"causal": True, "align": "top-left"}),
    Case("window", 1, 4, 2, 100, 100, 32, 32, {"window": (20, 3)}),
    Case("chunk", 1, 4, 2, 70, 70, 32, 32, {"causal": True, "chunk": 16}),
    Case("rows that see no key", 1, 4, 2, 90, 30, 32, 32, {"causal": True}),
    Case("softcap, sink", 2, 6, 2, 40, 40, 32, 32, {"softcap": 3.0, "sink": True, "causal": True}),
    Case("mask, bias", 2, 4, 2, 40, 70, 32, 32, {"mask": True, "bias": True}),
    Case("ALiBi", 2, 4, 2, 40, 70, 32, 32, {"alibi_slopes": True, "causal": True}),
    Case("dropout", 2, 4, 2, 40, 70, 32, 32, {"dropout_p": 0.2, "seed": 7, "causal": True}),
    Case("lengths", 3, 4, 2, 40, 70, 32, 32, {"q_lens": (40, 0, 13), "kv_lens": (70, 9, 0), "causal": True}),
    Case("packed sequences", 3, 4, 2, 40, 50, 32, 32, {"packed": ((40, 50), (0, 7), (25, 25)), "causal": True}),
    Case("many tiles", 2, 8, 2, 260, 260, 16, 16, {"causal": True}),
)


class Call(NamedTuple):
    """One case in one dtype, in poisoned memory, and what is right."""

    name: str
    arrays: tuple  # dout, q, k, v
    dlse: np.ndarray
    options: dict
    forward: tuple  # (names, reference results, naive results)
    backward: tuple


def poisoned(x):
    """A copy of x between NaNs (True for masks, the largest number for integers)."""
    fill = np.nan if x.dtype.kind not in "biu" else True if x.dtype == bool else np.iinfo(x.dtype).max
    flat = np.full(x.size + 2 * GUARD, fill, x.dtype)
    view = flat[GUARD : GUARD + x.size].reshape(x.shape)
    view[...] = x
    return view


def _memory(x):
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _pack(x, lens):
    """[b, h, s, d] as packed rows [total, h, d]."""
    return np.concatenate([rows[:, :n].swapaxes(0, 1) for rows, n in zip(x, lens, strict=True)])


def build(case, dtype):
    rng = np.random.default_rng([CASES.index(case) if case in CASES else len(CASES), DTYPES.index(dtype.name)])
    b, hq, hk, sq, sk, d, dv = case[1:8]
    options = dict(case.options)
    q, k, v, dout = (rng.standard_normal(n) for n in ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv), (b, hq, sq, dv)))
    dlse = rng.standard_normal((b, hq, sq))
    packed = options.pop("packed", None)
    if packed:
        q_lens, kv_lens = zip(*packed, strict=True)
        q, dout, k, v = (_pack(x, lens) for x, lens in ((q, q_lens), (dout, q_lens), (k, kv_lens), (v, kv_lens)))
        dlse = np.concatenate([rows[:, :n] for rows, n in zip(dlse, q_lens, strict=True)], axis=1)
        options |= {"cu_seqlens_q": np.cumsum((0, *q_lens)), "cu_seqlens_kv": np.cumsum((0, *kv_lens))}
    if "q_lens" in options:
        for n in range(b):
            q[n, :, options["q_lens"][n] :] = dout[n, :, options["q_lens"][n] :] = dlse[n, :, options["q_lens"][n] :] = np.nan
            k[n, :, options["kv_lens"][n] :] = v[n, :, options["kv_lens"][n] :] = np.nan
    if "mask" in options:
        options["mask"] = rng.random((b, 1, 1, sk)) < 0.8
    if "bias" in options:
        bias = rng.standard_normal((1, hq, sq, sk))
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        options["bias"] = bias.astype(dtype)
    if "sink" in options:
        options["sink"] = rng.standard_normal(hq).astype(dtype)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = np.float32(2.0) ** -np.arange(1, hq + 1, dtype=np.float32)
    for name in ("q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_kv"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    options = {name: poisoned(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    arrays = tuple(poisoned(x.astype(dtype)) for x in (dout, q, k, v))
    dlse = poisoned(dlse.astype(_bounds.accumulator(dtype)))
    exact = [_bounds.exact(x, dtype) for x in arrays]
    exact_options = {name: _bounds.exact(x, dtype) if name in ("bias", "sink") else x for name, x in options.items()}
    forward = reference.attention(*exact[1:], return_lse=True, **exact_options)
    backward = reference.attention_backward(*exact, *forward, dlse=_bounds.exact(dlse, dtype), **exact_options)
    return Call(
        case.name,
        arrays,
        dlse,
        options,
        (("out", "lse"), forward, _bounds.naive_forward(*arrays[1:], **options)),
        (backward._fields, backward, _bounds.naive_backward(*arrays, dlse=dlse, **options)),
    )


# ---- one kernel, one call ----


class Row:
    """A line of the table: one kernel in one dtype over all cases."""

    def __init__(self, kernel, dtype):
        self.kernel, self.dtype = kernel, dtype
        self.cases, self.refused, self.problems = 0, [], []
        self.share, self.worst = 0.0, "-"
        self.repeat = self.threads = self.memory = True

    def check(self, call, device):
        run = _forward if self.kernel["pass"] == "forward" else _backward
        names, expected, naive = call.forward if run is _forward else call.backward
        inputs = [x for x in (*call.arrays, call.dlse, *call.options.values()) if isinstance(x, np.ndarray)]
        before = [_memory(x).tobytes() for x in inputs]
        try:
            results, clean = run(call, self.kernel["name"], device)
        except NotImplementedError as refusal:
            self.refused.append(f"{call.name}: {refusal}")
            return
        except (RuntimeError, TypeError, ValueError) as error:
            self.problems.append(f"{call.name}: {type(error).__name__}: {error}")
            return
        self.cases += 1
        self._judge(call, names, results, expected, naive)
        if not clean:
            self._fail("memory", call, "bytes around out were written")
        if not _same(results, run(call, self.kernel["name"], device)[0]):
            self._fail("repeat", call, "a second call gave other bits")
        if device == "cpu" and not _same(results, *_with_other_threads(run, call, self.kernel["name"], device)):
            self._fail("threads", call, "one thread and several gave different bits")
        if before != [_memory(x).tobytes() for x in inputs]:
            self._fail("memory", call, "an input, or bytes around it, were written")

    def _judge(self, call, names, results, expected, naive):
        factor = _bounds.FORWARD_FACTOR if self.kernel["pass"] == "forward" else _bounds.BACKWARD_FACTOR
        for n, name in enumerate(names):
            if (results[n] is None) != (expected[n] is None):
                self.problems.append(f"{call.name}: {name} is {'missing' if results[n] is None else 'unasked for'}")
            elif results[n] is not None:
                verdict = _bounds.judge(results[n], expected[n], (x[n] for x in naive), results[n].dtype, factor)
                share = verdict.error / verdict.bound if verdict.bound else 0.0 if verdict.error == 0 else np.inf
                if verdict.problem:
                    self.problems.append(f"{call.name}: {name}: {verdict.problem}")
                if share > self.share:
                    self.share, self.worst = share, f"{call.name}: {name}"

    def _fail(self, column, call, words):
        setattr(self, column, False)
        self.problems.append(f"{call.name}: {words}")


def _where(device):
    return {} if device == "cpu" else {"device": device}


def _forward(call, kernel, device):
    """((out, lse), whether nothing but out was written around it)."""
    _, q, _, v = call.arrays
    out = poisoned(np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype))
    memory = _memory(out)
    _, lse = flashgqa.attention(*call.arrays[1:], return_lse=True, out=out, kernel=kernel, **_where(device), **call.options)
    clean = bool(np.isnan(memory[:GUARD]).all() and np.isnan(memory[memory.size - GUARD :]).all())
    return (out, lse), clean


def _backward(call, kernel, device):
    out, lse = flashgqa.attention(*call.arrays[1:], return_lse=True, **_where(device), **call.options)
    gradients = flashgqa.attention_backward(
        *call.arrays, out, lse, dlse=call.dlse, kernel=kernel, **_where(device), **call.options
    )
    return gradients, True


def _with_other_threads(run, call, kernel, device):
    """The results of one thread, and of at least three."""
    usual = flashgqa.get_num_threads()
    try:
        for count in (1, max(3, usual)):
            flashgqa.set_num_threads(count)
            yield run(call, kernel, device)[0]
    finally:
        flashgqa.set_num_threads(usual)


def _same(first, *others):
    bits = [None if x is None else x.tobytes() for x in first]
    return all(bits == [None if x is None else x.tobytes() for x in other] for other in others)


# ---- all of them ----


def numpy_dtypes():
    """{name: dtype} of those NumPy has here; bfloat16 with ml_dtypes."""
    dtypes = {name: np.dtype(name) for name in DTYPES if name != "bfloat16"}
    try:
        import ml_dtypes
    except ImportError:
        return dtypes
    return dtypes | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _choose(device, dtypes, kernels):
    """(dtypes, kernels) to verify, or ValueError with the choice there is."""
    config = flashgqa.show_config()
    if device == "cuda" and not config["cuda"]:
        raise ValueError(f"no CUDA kernels to verify: {config['cuda_reason']}")
    there = [row for row in flashgqa.kernels() if row["device"] == device and row["pass"] in ("forward", "backward")]
    for name in kernels or ():
        row = next((row for row in there if row["name"] == name), None)
        if row is None:
            raise ValueError(f"--kernel {name}: choose from {', '.join(row['name'] for row in there)}")
        if not row["available"]:
            raise ValueError(f"--kernel {name}: {row['reason']}")
    available = numpy_dtypes()
    for name in dtypes or ():
        if name not in available:
            raise ValueError(f"--dtype {name}: NumPy has no {name} without ml_dtypes; pip install ml_dtypes")
    if "bfloat16" not in available and not dtypes:
        print("bfloat16 is not verified: NumPy has it only with ml_dtypes (pip install ml_dtypes)")
    return (
        {name: dtype for name, dtype in available.items() if not dtypes or name in dtypes},
        [row for row in there if row["available"] and (not kernels or row["name"] in kernels)],
    )


def verify(device="cpu", dtypes=None, kernels=None, cases=CASES):
    """Runs and prints; exit code 0, or 1 if anything is wrong."""
    dtypes, chosen = _choose(device, dtypes, kernels)
    rows = [Row(kernel, dtype) for kernel in chosen for dtype in dtypes]
    with Progress("verify", len(cases) * len(dtypes)) as bar:
        for case in cases:
            for name, dtype in dtypes.items():
                call = build(case, dtype)
                for row in rows:
                    if row.dtype == name:
                        row.check(call, device)
                bar.step()
    return report(rows, len(cases))


def report(rows, cases):
    width = max(len(row.kernel["name"]) for row in rows)
    where = max(len("worst at"), *(len(row.worst) for row in rows))
    print(
        f"{'kernel':<{width}}  {'dtype':<8}  {'cases':>5}  {'error/allowed':>13}  {'worst at':<{where}}  "
        "repeat  threads  memory  result"
    )
    for row in rows:
        columns = (
            f"{row.kernel['name']:<{width}}", f"{row.dtype:<8}", f"{row.cases:>5}", f"{row.share:13.2f}", f"{row.worst:<{where}}",
            f"{'same' if row.repeat else 'DIFFER':<6}",
            f"{'-' if row.kernel['device'] != 'cpu' else 'same' if row.threads else 'DIFFER':<7}",
            f"{'clean' if row.memory else 'DIRTY':<6}", "FAIL" if row.problems else "ok" if row.cases else "refused",
        )  # fmt: skip
        print("  ".join(columns))
    for row in rows:
        for problem in row.problems:
            print(f"FAIL {row.kernel['name']} {row.dtype}: {problem}")
    for row in rows:
        for refusal in row.refused:
            print(f"not served by {row.kernel['name']} {row.dtype}: {refusal}")
    failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} lines of {cases} cases, {failed} failed" if failed else f"{len(rows)} lines of {cases} cases: all passed")
    print("allowed: 2x (gradients 3x) the error of a naive computation in the same dtype + 2 ulp, both against float64")
    sys.stdout.flush()
    return int(failed > 0)
