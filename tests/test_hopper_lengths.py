"""Every pair of 1 to 130 queries and 1 to 260 keys by the forward kernels for Hopper, each row forced, against float64."""

import pytest
import torch
from decode_formula import agree, attend
from test_hopper import MASKS, ROWS, inputs, of_name, rows_for

import flashgqa

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
QUERIES, KEYS = 130, 260
STEP = 2        # lengths of queries at once: their float64 takes some 2 GB
WIDTHS = list(dict.fromkeys(map(of_name, ROWS)))


@pytest.fixture(autouse=True)
def nothing_kept():
    """PyTorch's allocator would keep its gigabytes from the processes beside this one."""
    yield
    torch.cuda.empty_cache()


def visible(rows, keys, sq, sk, causal=False, align="bottom-right", window=(None, None), chunk=None):
    """Which of sk keys each of sq rows sees, and how far they are from its diagonal, in sequences of so many rows and keys."""
    i, j = torch.arange(sq, device="cuda")[:, None], torch.arange(sk, device="cuda")
    rows, keys = rows[:, None, None], keys[:, None, None]
    diagonal = i if align == "top-left" else i + keys - rows
    left, right = window
    seen = (i < rows) & (j < keys)
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None:
        seen = seen & (j >= diagonal - left)
    if right is not None:
        seen = seen & (j <= diagonal + right)
    if chunk is not None:
        seen = seen & (j // chunk == torch.div(diagonal, chunk, rounding_mode="floor"))
    return seen[:, None, None], (diagonal - j).abs()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_all_pairs(width, mask):
    """Packed, and padded with NaN. The longest first: of growing tensors the allocator would keep every size, many gigabytes."""
    dtype, d, dv = width
    for least in range(QUERIES + 1 - STEP, 0, -STEP):
        lengths = torch.arange(least, least + STEP), torch.arange(1, KEYS + 1)
        queries, keys = (x.reshape(-1).int().cuda() for x in torch.meshgrid(*lengths, indexing="ij"))
        sq = least + STEP - 1
        q, k, v = inputs(len(queries), 1, 1, sq, KEYS, d, dv, dtype)
        present = [torch.arange(x.shape[2], device="cuda") < n[:, None] for x, n in ((q, queries), (k, keys))]
        seen, distance = visible(queries, keys, sq, KEYS, **MASKS[mask])
        (exact, lse), (naive, _) = (
            attend((q.to(sums) @ k.to(sums).mT)[:, :, None] * d**-0.5, v.to(stored), seen, distance, stored)
            for sums, stored in ((torch.float64, torch.float64), (torch.float32, dtype))
        )  # fmt: skip
        packed = [x[:, 0][there][:, None] for x, there in zip((q, k, v), (present[0], present[1], present[1]), strict=True)]
        starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys)]
        for x, there in zip((q, k, v), (present[0], present[1], present[1]), strict=True):
            x.masked_fill_(~there[:, None, :, None], float("nan"))
        rows = present[0]
        for name in rows_for(dtype, d, dv, ("short", "tall", "plain")):
            call = {"return_lse": True, "kernel": name, **MASKS[mask]}
            agree(*flashgqa.attention(q, k, v, q_lens=queries, kv_lens=keys, **call), exact, lse, naive)
            out, ends = flashgqa.attention(*packed, cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], **call)
            agree(out[:, 0], ends[0], exact[:, 0][rows], lse[:, 0][rows], naive[:, 0][rows])
