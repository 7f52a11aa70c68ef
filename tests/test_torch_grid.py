"""scaled_dot_product_attention and flash_attn's functions against torch's own results, outputs and gradients.

Over a grid of dtypes, head dims 32 to 256, lengths 1 to 1025, masks, windows, and dropout by the mask that flashgqa.dropout_mask
returns: all of it on a GPU, a part on the CPU.
"""

import itertools

import pytest

import flashgqa

torch = pytest.importorskip("torch")

from torch_tools import DEVICES, assert_near, inputs, on_devices, randn, seeded, seen  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402

DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
HEAD_DIMS = (32, 64, 96, 128, 256)
LENGTHS = ((1, 1), (1, 65), (33, 33), (65, 130), (127, 64), (1, 1025), (1025, 1025))
DROPOUT = 0.25


def points(device):
    """Head dim and lengths of each test."""
    for d, (sq, sk) in itertools.product(HEAD_DIMS, LENGTHS):
        if device == "cuda" or sq < 1025 or d == 64:
            yield device, d, sq, sk


POINTS = [point for device in DEVICES for point in points(device)]


def combinations(device, d, sq, sk, kinds):
    """Dtypes and kinds of a point: all on a GPU; on the CPU half, each at some point of every head dim."""
    for n, (dtype, kind) in enumerate(itertools.product(DTYPES[device], kinds)):
        if sq == 1025 and device == "cpu" and dtype != torch.float32:
            continue
        if device == "cuda" or (n + LENGTHS.index((sq, sk)) + HEAD_DIMS.index(d)) % 2 == 0:
            yield dtype, kind


def torchs(q, k, v, bias, mask=None, keep=None, causal=False):
    """torch.nn.functional.scaled_dot_product_attention under SDPBackend.MATH, but with a mask of dropout."""
    added = bias if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    p = 0.0 if keep is None else DROPOUT
    operator = torch.ops.aten._scaled_dot_product_attention_math
    return operator(q, k, v, added, p, causal, keep, enable_gqa=True)[0]


def agree(ours, tensors, bias=None, **options):
    """Ours against torch's in float64, with torch's in the dtype for the scale of the errors; outputs and gradients."""
    dtype, results = tensors[0].dtype, []
    for function, to in ((ours, dtype), (torchs, torch.float64), (torchs, dtype)):
        given = [x if x is None else x.detach().to(to).requires_grad_() for x in (*tensors, bias)]
        out = function(*given) if function is ours else function(*given, **options)
        if not results:
            cotangent = torch.randn(out.shape, dtype=torch.float32, device=out.device).to(dtype)
        wanted = [x for x in given if x is not None]
        gradients = torch.autograd.grad(out, wanted, cotangent.to(to), allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *gradients))
    for n, (got, exact, naive) in enumerate(zip(*results, strict=True)):
        assert got.shape == exact.shape and got.dtype == dtype
        if exact.any():
            assert_near(got, exact, naive, dtype, 2 if n == 0 else 3)
        else:  # torch's own may have no error there; ours has what the rounding of out leaves of a difference
            sums = (cotangent.double() * results[1][0]).abs().sum(-1).max() * max(x.detach().abs().max() for x in tensors)
            assert got.abs().max() <= 4 * torch.finfo(dtype).eps * sums


def dropped(sq, sk, device):
    """The mask of a call after torch.manual_seed(9)."""
    torch.manual_seed(9)
    seed = torch.randint(2**32, (2,), device=device).cpu().numpy()
    torch.manual_seed(9)
    return torch.from_numpy(flashgqa.dropout_mask(1, 4, sq, sk, DROPOUT, seed)).to(device)


@pytest.mark.parametrize("device, d, sq, sk", POINTS)
def test_sdpa(device, d, sq, sk):
    for dtype, kind in combinations(device, d, sq, sk, ("plain", "causal", "mask", "bias", "dropout")):
        tensors = inputs(b=1, sq=sq, sk=sk, d=d, dv=d, dtype=dtype, device=device)
        bias = randn(1, 4, sq, sk, dtype=dtype, device=device) if kind == "bias" else None
        mask = torch.rand(sq, sk, device=device) < 0.7 if kind == "mask" else None
        keep = dropped(sq, sk, device) if kind == "dropout" else None
        p = DROPOUT if kind == "dropout" else 0.0

        def ours(q, k, v, bias, mask=mask, p=p, causal=kind == "causal"):
            return fg.scaled_dot_product_attention(q, k, v, bias if mask is None else mask, p, causal, enable_gqa=True)

        agree(ours, tensors, bias, mask=mask, keep=keep, causal=kind == "causal")


# causal, window_size, whether weights are dropped
RULES = {
    "plain": (False, (-1, -1), False),
    "causal": (True, (-1, -1), False),
    "window": (False, (20, 3), False),
    "causal window": (True, (7, -1), False),
    "right": (False, (-1, 0), True),
    "dropout": (True, (30, 0), True),
}


@pytest.mark.parametrize("device, d, sq, sk", POINTS)
def test_flash_attn(device, d, sq, sk):
    for dtype, name in combinations(device, d, sq, sk, RULES):
        causal, window, drops = RULES[name]
        tensors = inputs(b=1, hk=1, sq=sq, sk=sk, d=d, dv=d, dtype=dtype, device=device)
        keep = dropped(sq, sk, device) if drops else None

        def ours(q, k, v, bias, p=DROPOUT if drops else 0.0, causal=causal, window=window):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return fg.flash_attn_func(q, k, v, p, causal=causal, window_size=window).transpose(1, 2)

        agree(ours, tensors, mask=seen(sq, sk, causal, window, device), keep=keep)


@on_devices
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_flash_attn_varlen(device, d):
    """Sequences one after the other, against torch over all tokens with a mask between them."""
    lengths_q, lengths_k = (1, 65, 0, 33), (130, 65, 7, 12)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (lengths_q, lengths_k))
    for dtype, name in itertools.product(DTYPES[device], ("plain", "causal", "window")):
        causal, window, _ = RULES[name]
        tensors = inputs(b=1, sq=sum(lengths_q), sk=sum(lengths_k), d=d, dv=d, dtype=dtype, device=device)
        blocks = [seen(*lengths, causal, window, device) for lengths in zip(lengths_q, lengths_k, strict=True)]

        def ours(q, k, v, bias, causal=causal, window=window):
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            out = fg.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 65, 130, causal=causal, window_size=window)
            return out.transpose(0, 1)[None]

        agree(ours, tensors, mask=torch.block_diag(*blocks).bool())
