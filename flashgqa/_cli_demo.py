"""``python -m flashgqa demo``: attention over real text, timed, and checked against the float64 equations on sampled rows.

The text is the standard library's source. Its bytes become q, k and v of Llama-3-8B's head shape: an embedding of each byte
and the three before it, projections with fixed seeds, rotary positions. Keys and queries share a part of their projection, so
that a query attends most to places that end in the same bytes. The work goes one KV head and its query heads at a time,
which changes nothing in the result: that is what the progress bar counts.
"""

import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import flashgqa

from . import _bounds, reference
from ._memory import gib, peak_memory
from ._progress import Progress

HQ, HK, D = 32, 8, 128  # Llama 3 8B
GROUP = HQ // HK
EMBEDDING = 128
CONTEXT = 4  # bytes that an embedding sees
ROTARY_BASE = 500_000.0  # Llama 3's
SAMPLES = 4  # rows, and keys, checked in each KV head and its query heads


class Inputs(NamedTuple):
    q: np.ndarray  # [HQ, s, D]
    k: np.ndarray  # [HK, s, D]
    v: np.ndarray
    dout: np.ndarray  # as q


class Results(NamedTuple):
    out: np.ndarray  # as q
    lse: np.ndarray  # [HQ, s]
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def read_text(path, tokens):
    """(name, bytes [tokens]) of a file, or of as many files of the standard library as it takes."""
    if path is not None:
        data = Path(path).read_bytes()
        if len(data) < tokens:
            raise ValueError(f"{path} has {len(data)} bytes: --tokens {tokens} needs as many; pass a longer file or fewer tokens")
        return str(path), np.frombuffer(data[:tokens], np.uint8)
    folder = Path(sysconfig.get_path("stdlib"))
    data, names = b"", []
    for file in sorted(folder.glob("*.py")):
        if len(data) >= tokens:
            break
        data += file.read_bytes()
        names.append(file.name)
    if len(data) < tokens:
        raise ValueError(
            f"the standard library's source here has {len(data)} bytes: --tokens {tokens} needs as many; "
            "pass a file with --text, or fewer tokens"
        )
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"the standard library's source: {', '.join(names[:2])}{more}", np.frombuffer(data[:tokens], np.uint8)


def _embed(text, rng):
    """[s, EMBEDDING]: each byte and, weaker, those before it."""
    x = np.zeros((len(text), EMBEDDING), np.float32)
    for n in range(CONTEXT):
        table = rng.standard_normal((256, EMBEDDING), np.float32) * np.float32(0.9**n)
        x[n:] += table[text[: len(text) - n]]
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True))


def _rotary(s):
    """cos and sin of the positions' angles, [s, D/2]."""
    angles = np.arange(s)[:, None] * ROTARY_BASE ** (-np.arange(D // 2) / (D // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x, cos, sin):
    half = D // 2
    return np.concatenate([x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], axis=1)


def make_inputs(text):
    rng = np.random.default_rng(2305_13245)
    s = len(text)
    x, (cos, sin) = _embed(text, rng), _rotary(s)

    def projection():
        return rng.standard_normal((EMBEDDING, D), np.float32) / np.float32(np.sqrt(EMBEDDING))

    inputs = Inputs(*(np.empty((heads, s, D), np.float32) for heads in (HQ, HK, HK, HQ)))
    for kv in range(HK):
        key = projection()
        inputs.k[kv] = _rotate(x @ key, cos, sin)
        inputs.v[kv] = x @ projection()
        for h in range(kv * GROUP, (kv + 1) * GROUP):
            inputs.q[h] = _rotate(x @ (np.float32(0.8) * key + np.float32(0.6) * projection()), cos, sin)
            rng.standard_normal(out=inputs.dout[h], dtype=np.float32)
    return inputs


def group(kv):
    """Query heads of a KV head."""
    return slice(kv * GROUP, (kv + 1) * GROUP)


def run(inputs):
    """(Results, seconds forward, seconds backward)."""
    q, k, v, dout = inputs
    results = Results(np.empty_like(q), np.empty(q.shape[:2], np.float32), np.empty_like(q), np.empty_like(k), np.empty_like(v))
    seconds = []
    with Progress("forward", HK) as bar:
        start = time.perf_counter()
        for kv in range(HK):
            heads, one = group(kv), slice(kv, kv + 1)
            _, results.lse[heads] = flashgqa.attention(
                q[heads], k[one], v[one], causal=True, return_lse=True, out=results.out[heads]
            )
            bar.step()
        seconds.append(time.perf_counter() - start)
    with Progress("backward", HK) as bar:
        start = time.perf_counter()
        for kv in range(HK):
            heads, one = group(kv), slice(kv, kv + 1)
            gradients = flashgqa.attention_backward(
                dout[heads], q[heads], k[one], v[one], results.out[heads], results.lse[heads], causal=True
            )
            results.dq[heads], results.dk[one], results.dv[one] = gradients[:3]
            bar.step()
        seconds.append(time.perf_counter() - start)
    return results, *seconds


# ---- check ----


class Sample(NamedTuple):
    """Part of one result: what we got, the reference, and the naive float32 computation in one order of sums after another."""

    got: np.ndarray
    expected: np.ndarray
    naive: object


def _samples_of_row(inputs, results, kv, i):
    """out, lse and dq of row i: an attention of one query over the i + 1 keys that it sees."""
    heads, one, row, seen = group(kv), slice(kv, kv + 1), slice(i, i + 1), slice(i + 1)
    q, k, v, dout = inputs.q[heads, row], inputs.k[one, seen], inputs.v[one, seen], inputs.dout[heads, row]
    exact = [_bounds.exact(x, q.dtype) for x in (dout, q, k, v)]
    out, lse = reference.attention(*exact[1:], return_lse=True)
    dq = reference.attention_backward(*exact, out, lse).dq
    forward, backward = _bounds.naive_forward(q, k, v), _bounds.naive_backward(dout, q, k, v)
    yield "out", Sample(results.out[heads, row], out, (x[0] for x in forward))
    yield "lse", Sample(results.lse[heads, row], lse, (x[1] for x in forward))
    yield "dq", Sample(results.dq[heads, row], dq, (x.dq for x in backward))


def _samples_of_key(inputs, results, kv, j):
    """dk and dv of key j: the backward pass of the rows from j on over that one key, a part of their whole softmax.

    It starts, as the backward pass does, from the forward pass's out and lse.
    """
    heads, key, rows = group(kv), (slice(kv, kv + 1), slice(j, j + 1)), slice(j, None)
    arrays = inputs.dout[heads, rows], inputs.q[heads, rows], inputs.k[key], inputs.v[key]
    saved = results.out[heads, rows], results.lse[heads, rows]
    exact = reference.attention_backward(*(_bounds.exact(x, x.dtype) for x in arrays + saved))
    naive = _bounds.naive_backward(*arrays, saved=saved)
    yield "dk", Sample(results.dk[key], exact.dk, (x.dk for x in naive))
    yield "dv", Sample(results.dv[key], exact.dv, (x.dv for x in naive))


def check(inputs, results):
    """{name of a result: the error rule's verdict over sampled rows and keys of every head}."""
    s = inputs.q.shape[1]
    rng = np.random.default_rng(0)
    samples = {name: [] for name in ("out", "lse", "dq", "dk", "dv")}
    with Progress("check", HK) as bar:
        for kv in range(HK):
            # First and last always, the rest anywhere.
            for i in (0, s - 1, *(int(n) for n in rng.integers(0, s, SAMPLES - 2))):
                for name, sample in (*_samples_of_row(inputs, results, kv, i), *_samples_of_key(inputs, results, kv, i)):
                    samples[name].append(sample)
            bar.step()
        return {name: _judge(name, parts) for name, parts in samples.items()}


def _judge(name, parts):
    got, expected, naive = zip(*parts, strict=True)
    flat = [np.concatenate([x.ravel() for x in arrays]) for arrays in (got, expected)]
    orders = (np.concatenate([x.ravel() for x in arrays]) for arrays in zip(*naive, strict=True))
    factor = _bounds.BACKWARD_FACTOR if name.startswith("d") else _bounds.FORWARD_FACTOR
    return _bounds.judge(*flat, orders, flat[0].dtype, factor)


# ---- report ----


def _words(text, at, width=24):
    """The text that ends at a position, on one line."""
    return ascii(bytes(text[max(0, at + 1 - width) : at + 1]).decode("latin-1"))


def _print_glimpse(inputs, text):
    """Where the last token looks: weights of one row, in O(s) memory."""
    s = len(text)
    weights = flashgqa.attention_weights(inputs.q[group(0)], inputs.k[:1], rows=[s - 1], causal=True)[0, 0]
    print(f"query head 0 at the last token, after {_words(text, s - 1)}, looks at")
    for j in np.argsort(-weights)[:3]:
        print(f"  {100 * weights[j]:5.1f} %  token {j:<6d} after {_words(text, j)}")


def demo(tokens, path=None):
    """Runs and prints; exit code 0, or 1 if a sampled row is wrong."""
    before = peak_memory()
    source, text = read_text(path, tokens)
    print(f"text      {tokens} bytes of {source}")
    inputs = make_inputs(text)
    print(f"shape     q [{HQ}, {tokens}, {D}], k and v [{HK}, {tokens}, {D}], float32, causal (the heads of Llama 3 8B)")
    one = (inputs.q[group(0)], inputs.k[:1], inputs.v[:1])
    plans = [flashgqa.explain(*one, causal=True, backward=backward) for backward in (False, True)]
    threads = flashgqa.get_num_threads()
    names = ", ".join(plan["kernel"] for plan in plans)
    print(f"kernel    {names} on the CPU, {threads} thread{'s' * (threads > 1)}", flush=True)
    results, *seconds = run(inputs)
    after = peak_memory()

    print(f"\n{'pass':<9} {'time':>9} {'work':>14} {'rate':>16}")
    for name, plan, spent in zip(("forward", "backward"), plans, seconds, strict=True):
        work = HK * plan["flops"] / 1e9
        print(f"{name:<9} {spent:7.2f} s {work:8.1f} GFLOP {work / spent:8.1f} GFLOP/s")

    arrays = sum(x.nbytes for x in (*inputs, *results))
    print()
    if before is not None:
        print(f"memory    {gib(after)} peak of this process, {gib(before)} of it before the first array")
    print(f"          {gib(arrays)} are inputs and results")
    print(f"          {gib(4 * HQ * tokens**2)} would be the {tokens} x {tokens} scores of {HQ} heads, which never exist\n")
    _print_glimpse(inputs, text)
    sys.stdout.flush()

    worst = check(inputs, results)
    print(f"\ncheck     {SAMPLES} rows and {SAMPLES} keys of every head against the float64 equations")
    print(f"{'result':<9} {'max error':>9} {'allowed':>9}")
    for name, verdict in worst.items():
        print(f"{name:<9} {verdict.error:9.2e} {verdict.bound:9.2e}  {verdict.problem or 'ok'}")
    failed = any(verdict.problem for verdict in worst.values())
    print("FAILED" if failed else "All sampled rows are right.")
    return int(failed)
