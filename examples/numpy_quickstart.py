"""Grouped-query attention on NumPy arrays: forward, backward, and what a call would run.

python examples/numpy_quickstart.py
"""

import numpy as np

import flashgqa

rng = np.random.default_rng(0)
b, hq, hk, s, d = 2, 8, 2, 256, 64  # four query heads share each KV head
q = rng.standard_normal((b, hq, s, d), np.float32)
k = rng.standard_normal((b, hk, s, d), np.float32)
v = rng.standard_normal((b, hk, s, d), np.float32)

out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True)
print("out", out.shape, out.dtype, " lse", lse.shape, lse.dtype)

# The same by the definition: query head h reads KV head h // 4, row i sees keys j <= i.
hidden = ~np.tri(s, dtype=bool)
for h in range(hq):
    scores = q[:, h] @ k[:, h // 4].swapaxes(1, 2) / np.sqrt(d)
    scores[:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    assert np.allclose(out[:, h], weights @ v[:, h // 4], atol=1e-5)
print("equal to the loop over heads")

# Gradients of sum(out * dout), with the options of the forward pass.
dout = rng.standard_normal(out.shape, np.float32)
gradients = flashgqa.attention_backward(dout, q, k, v, out, lse, causal=True)
print("dq", gradients.dq.shape, " dk", gradients.dk.shape, " dv", gradients.dv.shape)

# Options combine: the last 64 tokens only, with dropout and an additive bias for each head.
bias = rng.standard_normal((1, hq, 1, s), np.float32)
out = flashgqa.attention(q, k, v, window=(63, 0), bias=bias, dropout_p=0.1, seed=1)

# Which keys the last row of each head looks at, without the s x s matrix.
weights = flashgqa.attention_weights(q, k, rows=[s - 1], causal=True)
print("keys that the last row weighs most, by head:", weights[0, :, 0].argmax(axis=-1))

print()
print(flashgqa.explain(q, k, v, causal=True))
