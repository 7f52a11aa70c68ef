"""PyTorch tensors on the CPU: same memory in, torch tensors out, and the numbers of torch's own SDPA and autograd.

python examples/torch_cpu.py
"""

import torch

import flashgqa

torch.manual_seed(0)
hq, hk, s, d = 16, 4, 200, 64
q, k, v = (torch.randn(1, h, s, d) for h in (hq, hk, hk))

out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True)
dout = torch.randn_like(out)
dq, dk, dv, _, _ = flashgqa.attention_backward(dout, q, k, v, out, lse, causal=True)
print("out:", type(out).__name__, tuple(out.shape), out.dtype)

leaves = [x.clone().requires_grad_() for x in (q, k, v)]
theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
theirs.backward(dout)
for name, ours, other in [("out", out, theirs), *zip(("dq", "dk", "dv"), (dq, dk, dv), (x.grad for x in leaves), strict=True)]:
    print(f"{name:<3} largest difference to torch {(ours - other).abs().max().item():.1e}")
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)

# Sequences of different lengths without padding: rows joined, and where each sequence begins.
lengths = torch.tensor([5, 120, 75])
starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # [total, heads, d]
out = flashgqa.attention(*packed, cu_seqlens_q=starts, cu_seqlens_kv=starts, causal=True)
alone = flashgqa.attention(q[:, :, 5:125], k[:, :, 5:125], v[:, :, 5:125], causal=True)
torch.testing.assert_close(out[5:125], alone[0].transpose(0, 1))
print("packed:", tuple(out.shape), "- each sequence as if it were alone")

# bfloat16 works the same; sums are float32 inside.
out = flashgqa.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
print("out:", out.dtype)
