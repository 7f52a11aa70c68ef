"""Decoding of a 32-head layer over a long cache, with 32, 8 and 1 KV heads: bytes, and time for each new token.

python examples/kv_cache.py [tokens]
"""

import sys
import time

import numpy as np

import flashgqa

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
layers, hq, d, steps = 32, 32, 128, 6
rng = np.random.default_rng(0)
angles = np.arange(tokens + steps)[:, None] * 10000.0 ** -(np.arange(d // 2) / (d // 2))
rotary = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

print(f"{tokens} tokens cached, {hq} query heads of {d}; sizes are those of {layers} layers in float16")
for hk in (32, 8, 1):
    # Room for the new tokens as well: each call writes its key and value in place, and attends to everything before it.
    k_cache, v_cache = (rng.standard_normal((1, hk, tokens + steps, d), np.float32) for _ in range(2))
    times = []
    for step in range(steps):
        q = rng.standard_normal((1, hq, 1, d), np.float32)
        k, v = (rng.standard_normal((1, hk, 1, d), np.float32) for _ in range(2))
        start = time.perf_counter()
        flashgqa.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_lens=tokens + step, causal=True, rotary=rotary)
        times.append(time.perf_counter() - start)
    size = flashgqa.kv_cache_bytes(layers, hk, d, "float16", tokens)
    kind = {32: "MHA", 1: "MQA"}.get(hk, "GQA")
    print(f"{kind}  {hk:2d} KV heads  {size / 2**20:8.1f} MiB  {1e3 * sorted(times)[2]:8.2f} ms a layer and token (float32)")
