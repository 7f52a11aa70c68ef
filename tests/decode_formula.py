"""What follows the scores in the plain formulas of the decode tests."""
import math

import torch
from gpu import assert_alike


def of_each_head(rows, matrix):
    """rows [b, hk, g, n, m] @ matrix [b, hk, m, l]: once a KV head, not expanded to its group, which takes gigabytes."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def attend(x, v, seen, distance, dtype, sink=None, softcap=None, alibi_slopes=None):
    """out and LSE of scores x [b, hk, g, sq, sk] over v [b, hk, sk, dv], computed in `dtype`, softcap and ALiBi at least in
    float32. seen: which keys a row sees, distance: of key and diagonal [b, sq, sk]; a row that sees none gives 0."""
    b, hk, g, sq, sk = x.shape
    if softcap is not None or alibi_slopes is not None:
        x = x.to(torch.promote_types(dtype, torch.float32))
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    if alibi_slopes is not None:
        x = x - alibi_slopes.to(x).expand(b, hk * g).view(b, hk, g, 1, 1) * distance[:, None, None]
    x = x.masked_fill(~seen, -math.inf)
    if sink is not None:
        x = torch.cat([x, sink.to(dtype).view(1, hk, g, 1, 1).expand(b, hk, g, sq, 1)], -1)
    p = x.softmax(-1).nan_to_num(nan=0.0)[..., :sk]
    return of_each_head(p.to(dtype), v).reshape(b, hk * g, sq, -1), x.logsumexp(-1).reshape(b, hk * g, sq)


def agree(out, lse, exact, exact_lse, naive):
    """Twice the error of the plain formula in the same dtype and two units, as everywhere; and row by row: beside sequences of
    few keys, whose results are large, that hides what many keys give."""
    assert (out - exact).abs().max() <= 2 * (naive - exact).abs().max() + torch.finfo(out.dtype).eps * exact.abs().max()
    assert_alike([out], [exact], ["out"])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=3e-5)
