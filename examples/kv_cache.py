"""One decoding step of a 32-head layer over a long cache, with 32, 8 and 1 KV heads: bytes, and time.

python examples/kv_cache.py [tokens]
"""

import sys
import time

import numpy as np

import flashgqa

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
layers, hq, d = 32, 32, 128
rng = np.random.default_rng(0)
q = rng.standard_normal((1, hq, 1, d), np.float32)

print(f"{tokens} tokens cached, {hq} query heads of {d}; sizes are those of {layers} layers in float16")
for hk in (32, 8, 1):
    k = rng.standard_normal((1, hk, tokens, d), np.float32)
    v = rng.standard_normal((1, hk, tokens, d), np.float32)
    flashgqa.attention(q, k, v)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        flashgqa.attention(q, k, v)
        times.append(time.perf_counter() - start)
    size = flashgqa.kv_cache_bytes(layers, hk, d, "float16", tokens)
    kind = {32: "MHA", 1: "MQA"}.get(hk, "GQA")
    print(f"{kind}  {hk:2d} KV heads  {size / 2**20:8.1f} MiB  {1e3 * sorted(times)[2]:8.2f} ms a layer and token (float32)")
