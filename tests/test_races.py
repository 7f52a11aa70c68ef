"""What another thread writes to the arrays of a call while it runs is the caller's mistake, but never a crash."""

import subprocess
import sys

import pytest

# A process of its own, which a crash may take. Another thread writes lengths, offsets, pages and rows, most of them bad.
PROGRAM = """
import sys, threading
import numpy as np
import flashgqa

sys.setswitchinterval(1e-5)
q, k = np.zeros((2, 4, 3, 16), "f4"), np.zeros((2, 2, 300, 16), "f4")
packed_q, packed_k, pool = np.zeros((200, 4, 16), "f4"), np.zeros((200, 2, 16), "f4"), np.zeros((8, 2, 16, 16), "f4")
out, lse = flashgqa.attention(q, k, k, return_lse=True)
good, bad, calls = {
    "lens": ([300, 300], [10**9, -5], [
        lambda: flashgqa.attention(q, k, k, kv_lens=x),
        lambda: flashgqa.attention_backward(out, q, k, k, out, lse, kv_lens=x),
        lambda: flashgqa.attention_weights(q, k, reduce="keys", kv_lens=x),
        lambda: flashgqa.attention_with_kvcache(q, k, k, cache_lens=x),
    ]),
    "offsets": ([0, 100, 200], [10**9, -5], [
        lambda: flashgqa.attention(packed_q, packed_k, packed_k, cu_seqlens_q=x, cu_seqlens_kv=x),
    ]),
    "pages": ([[3, 2], [5, 7]], [10**9, -(10**9)], [
        lambda: flashgqa.attention_with_kvcache(q, pool, pool, cache_lens=30, page_table=x),
    ]),
    "rows": ([1, 2, 0], [10**15, -5], [lambda: flashgqa.attention_weights(q, k, rows=x)]),
}[sys.argv[1]]
x = np.array(good, sys.argv[2])
running = True


def disturb():
    while running:
        for wrong in bad:
            x[1:] = wrong
            x[...] = good


thread = threading.Thread(target=disturb)
thread.start()
done = 0
try:
    for n in range(int(sys.argv[3])):
        try:
            calls[n % len(calls)]()
            done += 1
        except ValueError:
            pass
finally:
    running = False
    thread.join()
print(done)
"""


@pytest.mark.parametrize(
    "what, dtype, calls", [("lens", "i4", 3000), ("offsets", "i4", 1500), ("pages", "i4", 3000), ("rows", "i8", 3000)]
)
def test_index_arrays_that_change_during_a_call(what, dtype, calls):
    result = subprocess.run([sys.executable, "-c", PROGRAM, what, dtype, str(calls)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert int(result.stdout) > calls // 50, "next to no call passed its checks"
