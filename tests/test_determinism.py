"""The same bits: run to run, for any number of threads, whatever else is in the batch."""

import ctypes
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import Call, Case, build
from checking import same_bits

import flashgqa

# Large enough for several tasks, splits of the keys (few rows, many keys) and splits of the rows (one KV head).
CASES = [
    Case(b=2, hq=8, hk=2, sq=300, sk=300, d=64, causal=True),
    Case(hq=8, hk=1, sq=600, sk=600, d=64, dtype="bfloat16", causal=True),
    Case(b=2, hq=16, hk=2, sq=1, sk=6000, d=64),
    Case(b=1, hq=4, hk=4, sq=3, sk=9000, d=32, dtype="float16", kv_lens=(8999,)),
    Case(b=3, hq=6, hk=3, sq=200, sk=260, d=40, dtype="float64", dropout=0.2, bias="1h1k", sink=True, softcap=5.0),
    Case(b=2, hq=4, hk=1, sq=250, sk=250, d=33, bias="11qk", alibi="bh", mask="b11k", layout="bshd"),
    Case(b=3, hq=16, hk=8, sq=150, sk=170, bias="1hqk", q_lens=(20, 150, 99)),  # dbias is summed by the tasks that have dS
    Case(b=7, hq=4, hk=2, sq=90, sk=170, bias="1hqk", dtype="bfloat16"),        # and of parts of the batch
    Case(hq=8, hk=2, packed=((200, 200), (3, 2000), (0, 0), (350, 350)), causal=True, d=48),
]


def run(backend, call, **options):
    options = call.options | options
    out, lse = backend.attention(*call.inputs, **options, return_lse=True)
    return out, lse, *backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **options)


@pytest.fixture
def threads():
    before = flashgqa.get_num_threads()
    yield flashgqa.set_num_threads
    flashgqa.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(case, backend, threads):
    call = build(case)
    results = []
    for n in (1, 2, 2, 3):
        threads(n)
        results.append(run(backend, call))
    for other in results[1:]:
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsink"), results[0], other, strict=True):
            assert same_bits(a, b), name


UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(os.uname().machine)       # FE_UPWARD of fenv.h


@pytest.mark.skipif(UPWARD is None, reason="needs the number of a rounding mode")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_whatever_mode_the_calling_thread_is_in(case, threads):
    """Threads of the pool do not know its mode (fesetround, torch.set_flush_denormal), and they share the work."""
    call, libm = build(case), ctypes.CDLL("libm.so.6")
    expected = run(flashgqa, call)
    for n in (1, 3):
        threads(n)
        assert libm.fesetround(UPWARD) == 0
        try:
            results = run(flashgqa, call)
            assert libm.fegetround() == UPWARD
        finally:
            libm.fesetround(0)
        assert all(a is None or same_bits(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_order_may_be_freed_for_is_still_within_reach(case, backend):
    call = build(case)
    for a, b in zip(run(backend, call), run(backend, call, deterministic=False), strict=True):
        if a is not None:
            a, b = (x.astype(np.float64) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=0.02 * np.nanmax(np.abs(a[np.isfinite(a)])))


@pytest.mark.parametrize(
    "case",
    [
        Case(b=5, hq=8, hk=2, sq=150, sk=150, d=64, causal=True),
        Case(b=5, hq=8, hk=2, sq=1, sk=5000, d=64),
        Case(b=5, hq=4, hk=1, sq=65, sk=300, d=40, dtype="bfloat16", softcap=10.0, sink=True),
    ],
    ids=str,
)
def test_batch_invariant_rows_have_the_same_bits_alone(case, backend):
    call = build(case)
    batch = run(backend, call, batch_invariant=True)
    for n in range(case.b):
        own = {name: getattr(call, name)[n : n + 1] for name in ("q", "k", "v", "dout", "dlse")}
        alone = dataclasses.replace(call, **own)
        got = run(backend, alone, batch_invariant=True)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), batch, got, strict=False):
            assert same_bits(np.ascontiguousarray(a[n : n + 1]), b), (name, n)


def test_batch_invariant_sequences_have_the_same_bits_alone_and_packed(backend):
    case = Case(hq=8, hk=2, packed=((120, 120), (1, 3000), (64, 300)), causal=True, d=48)
    call = build(case)
    batch = run(backend, call, batch_invariant=True)
    cu_q, cu_k = call.options["cu_seqlens_q"], call.options["cu_seqlens_kv"]
    for n, (sq, sk) in enumerate(case.packed):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        options = call.options | {"cu_seqlens_q": np.int32([0, sq]), "cu_seqlens_kv": np.int32([0, sk])}
        alone = Call(call.q[rows], call.k[keys], call.v[keys], call.dout[rows], call.dlse[:, rows], options)
        got = run(backend, alone, batch_invariant=True)
        parts = (batch[0][rows], batch[1][:, rows], batch[2][rows], batch[3][keys], batch[4][keys])
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), parts, got, strict=False):
            assert same_bits(np.ascontiguousarray(a), b), (name, n)


PRINT_DIGEST = """
import hashlib, sys
sys.path[:0] = sys.argv[1:3]
import flashgqa, test_determinism
from cases import build
digest = hashlib.sha256()
for case in test_determinism.CASES:
    for x in test_determinism.run(flashgqa, build(case)):
        digest.update(b"" if x is None else x.tobytes())
print(flashgqa.get_num_threads(), digest.hexdigest())
"""


def test_same_bits_in_other_processes_with_other_thread_settings():
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(flashgqa.__file__))
    digests = set()
    for n in (1, 2):
        environment = os.environ | {"FLASHGQA_NUM_THREADS": str(n)}
        command = [sys.executable, "-c", PRINT_DIGEST, root, here]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
        assert printed[0] == str(n)
        digests.add(printed[1])
    assert len(digests) == 1
