"""flashgqa.torch under the names of FlashAttention-3 and xformers."""

import types

import pytest

torch = pytest.importorskip("torch")

from torch_tools import DEVICES, arguments_of, dense, gradients, near, on_devices, randn, seeded  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402
from flashgqa._torch_packing import moved_rows  # noqa: E402
from flashgqa.torch import fa3, xops  # noqa: E402
from flashgqa.torch.xops.fmha import attn_bias  # noqa: E402


def make(device, *shapes):
    return tuple(randn(*shape, dtype=DEVICES[device][0], device=device) for shape in shapes)


# ---- FlashAttention-3 ----

OPTIONS = "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, \
return_attn_probs=False"
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALES}, {OPTIONS}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
    f"softmax_scale=None, causal=False, qv=None, {DESCALES}, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, softmax_scale=None, causal=False, {DESCALES}, window_size=(-1, -1), attention_chunk=0, "
    "softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_fa3_signatures(name):
    assert arguments_of(getattr(fa3, name)) == f"({SIGNATURES[name]})"


def test_fa3_dense():
    q, k, v = make("cpu", (2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6))
    for theirs, ours in (
        ({}, {}),
        (dict(causal=True, softmax_scale=0.2, softcap=5.0), dict(causal=True, scale=0.2, softcap=5.0)),
        (dict(window_size=(3, -1), attention_chunk=4), dict(window=(3, None), chunk=4)),
    ):
        out, lse = fa3.flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
        expected, expected_lse = fg.attention(q, k, v, layout="bshd", return_lse=True, **ours)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        assert torch.equal(fa3.flash_attn_func(q, k, v, num_splits=4, pack_gqa=True, sm_margin=2, **theirs), out)
    packed = torch.cat([q, k, v.repeat(1, 1, 1, 2)[..., :8]], 2)
    out = fa3.flash_attn_qkvpacked_func(packed, causal=True, num_heads_q=4)
    assert torch.equal(out, fa3.flash_attn_func(q, k, packed[:, :, 6:], causal=True))
    qkv, = make("cpu", (2, 9, 3, 4, 8))
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv), fa3.flash_attn_func(*qkv.unbind(2)))
    for options in (dict(qv=q), dict(q_descale=q), dict(v_descale=q)):
        with pytest.raises(NotImplementedError, match="must be None"):
            fa3.flash_attn_func(q, k, v, **options)
    with pytest.raises(ValueError, match=r"qkv is \[2, 9, 8, 8\] and num_heads_q None: it must be"):
        fa3.flash_attn_qkvpacked_func(packed)
    with pytest.raises(ValueError, match="k has 0 heads"):
        fa3.flash_attn_qkvpacked_func(packed, num_heads_q=8)
    for name in ("rotary_sin", "rotary_seqlens"):
        with pytest.raises(ValueError, match=f"{name} is given without rotary_cos"):
            fa3.flash_attn_with_kvcache(q, k, v, **{name: q})


@on_devices
@pytest.mark.parametrize("causal", [False, True])
def test_fa3_varlen_and_used_rows(device, causal):
    q, k, v = make(device, (12, 4, 8), (14, 2, 8), (14, 2, 8))
    lengths = ([0, 3, 3, 9, 12], [0, 3, 5, 13, 14], [2, 0, 6, 0], [3, 1, 5, 1])
    cu_q, cu_k, used_q, used_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in lengths)
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 8, used_q, used_k, causal=causal, return_attn_probs=True)
    found = gradients((out,), (q, k, v))
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    wanted = [torch.zeros_like(x) for x in (q, k, v)]
    for n in (0, 2):
        rows, keys = slice(cu_q[n], cu_q[n] + used_q[n]), slice(cu_k[n], cu_k[n] + used_k[n])
        sq, sk = int(used_q[n]), int(used_k[n])
        allowed = torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq if causal else sk)
        part, part_lse = dense(q[None, rows], k[None, keys], v[None, keys], allowed)
        expected[rows], expected_lse[:, rows] = part[0].detach(), part_lse[0].detach()
        for a, b in zip(wanted, torch.autograd.grad(part, (q, k, v), torch.cos(out[None, rows].detach())), strict=True):
            a += b
    near(out, expected, device)
    near(lse, expected_lse, device)
    for a, b in zip(found, wanted, strict=True):
        near(a, b, device)
    plain = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 8, causal=causal)
    assert torch.equal(plain, fg.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 8, causal=causal))


def test_rows_behind_the_last_sequence_are_zero():
    """As on a GPU, where nobody knows how many rows there are."""
    x, cu_seqlens = torch.arange(1.0, 9.0)[:, None].requires_grad_(), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    moved = moved_rows(x, torch.tensor([1, 3, 4], dtype=torch.int32), cu_seqlens, 8)
    assert moved[:, 0].tolist() == [2, 3, 5, 6, 7, 0, 0, 0]
    moved.backward(torch.full((8, 1), torch.nan).index_fill(0, torch.arange(5), 1))
    assert x.grad[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1, 0]
    assert moved_rows(x, cu_seqlens[:0], cu_seqlens[:1], 0).shape == (0, 1)


def test_fa3_combine():
    q, k, v = make("cpu", (2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    parts = [fa3.flash_attn_func(q, k[:, x], v[:, x], return_attn_probs=True) for x in (slice(0, 4), slice(4, 9))]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    out, lse = fa3.flash_attn_combine(outs, lses.transpose(2, 3), out_dtype=torch.bfloat16)
    expected, expected_lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.dtype == torch.bfloat16
    near(lse.transpose(1, 2), expected_lse)
    into = torch.empty_like(outs[0])
    assert fa3.flash_attn_combine(outs, lses.transpose(2, 3), out=into)[0] is into
    near(into, expected)


# ---- xformers ----

LENGTHS_Q, LENGTHS_K = [3, 1, 5], [3, 4, 7]
ONE_EACH, STARTS = [2, 2, 2], [1, 5, 12, 20]


def mask_of(lengths_q, starts_k, lengths_k, total_k, seen):
    """Bool [queries, keys]: seen(i, j, queries, keys) inside of each sequence."""
    mask, row = torch.zeros(sum(lengths_q), total_k, dtype=torch.bool), 0
    for sq, start, sk in zip(lengths_q, starts_k, lengths_k, strict=False):
        for i in range(sq):
            for j in range(sk):
                mask[row + i, start + j] = seen(i, j, sq, sk)
        row += sq
    return mask


def everything(i, j, sq, sk):
    return True


def top_left(i, j, sq, sk):
    return j <= i


def bottom_right(i, j, sq, sk):
    return j <= i + sk - sq


def window(left, right):
    return lambda i, j, sq, sk: -left <= j - (i + sk - sq) <= right


def last_two(rule):
    """Causal, the last two keys."""
    return lambda i, j, sq, sk: rule(i, j, sq, sk) and not rule(i, j + 2, sq, sk)


def kinds(device):
    """name -> (bias, the sequences it speaks of, what a query sees there); None: one sequence, of the whole tensors."""
    block = attn_bias.BlockDiagonalMask.from_seqlens(LENGTHS_Q, LENGTHS_K, device=device)
    contiguous, padded = [0, 3, 7], [0, 8, 16]
    offset = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
    gappy = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(LENGTHS_Q, STARTS, LENGTHS_K, device=device)
    pad = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(LENGTHS_Q, 8, LENGTHS_K, device=device)
    single = {
        "lower": (attn_bias.LowerTriangularMask(), top_left),
        "from bottom right": (attn_bias.LowerTriangularFromBottomRightMask(), bottom_right),
        "causal local": (attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(2), last_two(bottom_right)),
        "local": (attn_bias.LocalAttentionFromBottomRightMask(2, 1), window(2, 1)),
    }
    blocks = {
        "block": (block, everything),
        "causal": (block.make_causal(), top_left),
        "causal br": (block.make_causal_from_bottomright(), bottom_right),
        "causal local": (block.make_local_attention(2), lambda i, j, sq, sk: i - 1 <= j <= i),
        "causal local br": (block.make_local_attention_from_bottomright(2), last_two(bottom_right)),
    }
    pads = {
        "padded": (pad, everything),
        "padded local": (pad.make_local_attention(1, 2), window(1, 2)),
        "padded offset": (offset.from_seqlens(LENGTHS_Q, 8, LENGTHS_K, device=device), bottom_right),
    }
    gaps = {"gappy": (gappy, everything), "gappy local": (gappy.make_local_attention(2, 0), window(2, 0))}
    even = {"padded even": (offset.from_seqlens(ONE_EACH, 8, LENGTHS_K, device=device), bottom_right)}
    joined = {"block even": (attn_bias.BlockDiagonalMask.from_seqlens(ONE_EACH, LENGTHS_K, device=device), everything)}
    for group, sequences in (
        (single, ([6], [0], [9], 9)),
        (blocks, (LENGTHS_Q, contiguous, LENGTHS_K, 14)),
        (pads, (LENGTHS_Q, padded, LENGTHS_K, 24)),
        (gaps, (LENGTHS_Q, STARTS, LENGTHS_K, 24)),
        (even, (ONE_EACH, padded, LENGTHS_K, 24)),
        (joined, (ONE_EACH, contiguous, LENGTHS_K, 14)),
    ):
        for name, (bias, seen) in group.items():
            yield name, bias, mask_of(*sequences, seen), 2 if group is single else 1


NUMBER_OF_KINDS = len(list(kinds("cpu")))


@on_devices
@pytest.mark.parametrize("number", range(NUMBER_OF_KINDS))
def test_xformers_biases(device, number):
    name, bias, mask, batch = list(kinds(device))[number]
    sq, sk = mask.shape
    q, k, v = make(device, (batch, sq, 4, 8), (batch, sk, 2, 8), (batch, sk, 2, 8))
    assert torch.equal(bias.materialize((1, *mask.shape)) == 0, mask[None]), name
    out = xops.memory_efficient_attention(q, k, v, attn_bias=bias)
    expected, _ = dense(q, k, v, mask.to(device))
    near(out, expected, device)
    for a, b in zip(gradients((out,), (q, k, v)), gradients((expected,), (q, k, v)), strict=True):
        near(a, b, device)
    # xformers' own object: another class of the same name with the same attributes.
    twin = type(type(bias).__name__, (), {})()
    vars(twin).update(vars(bias))
    assert torch.equal(xops.memory_efficient_attention(q, k, v, attn_bias=twin), out)
    moved = bias.to(device)
    assert type(moved) is type(bias) and torch.equal(xops.memory_efficient_attention(q, k, v, attn_bias=moved), out)


def test_xformers_shapes_and_tensor_biases():
    q, k, v = make("cpu", (2, 5, 4, 8), (2, 7, 4, 8), (2, 7, 4, 6))
    bias, = make("cpu", (2, 4, 5, 7))
    everywhere = torch.ones(5, 7, dtype=torch.bool)
    out = xops.memory_efficient_attention(q, k, v, bias, scale=0.3)
    expected, _ = dense(q, k, v, everywhere, bias, 0.3)
    near(out, expected)
    near(gradients((out,), (bias,))[0], gradients((expected,), (bias,))[0])
    causal = xops.LowerTriangularMask().add_bias(bias)
    near(xops.memory_efficient_attention(q, k, v, causal), dense(q, k, v, everywhere.tril(), bias)[0])
    one = xops.memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], bias[:, 0])
    assert one.shape == (2, 5, 6)
    near(one, dense(q[:, :, :1], k[:, :, :1], v[:, :, :1], everywhere, bias[:, :1])[0][:, :, 0])
    narrow = xops.memory_efficient_attention(*(x.bfloat16() for x in (q, k, v)), output_dtype=torch.float32)
    assert narrow.dtype == torch.float32


def test_xformers_groups():
    q, k, v = make("cpu", (2, 5, 8, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    expected = fg.attention(q, k, v, layout="bshd")
    grouped = [x.view(2, 7, 2, 1, 8).expand(2, 7, 2, 4, 8) for x in (k, v)]
    out = xops.memory_efficient_attention(q.view(2, 5, 2, 4, 8), *grouped)
    assert out.shape == (2, 5, 2, 4, 8) and torch.equal(out.flatten(2, 3), expected)
    for a, b in zip(gradients((out,), (q, k, v)), gradients((expected,), (q, k, v), torch.cos(expected.detach())), strict=True):
        near(a, b)
    full = [x.contiguous() for x in grouped]
    near(xops.memory_efficient_attention(q.view(2, 5, 2, 4, 8), *full), out)
    bias, = make("cpu", (2, 2, 4, 5, 7))
    biased = xops.memory_efficient_attention(q.view(2, 5, 2, 4, 8), *grouped, attn_bias=bias)
    near(biased.flatten(2, 3), fg.attention(q, k, v, bias=bias.flatten(1, 2), layout="bshd"))


def test_xformers_lists_of_tensors():
    tensors = make("cpu", (1, 3, 2, 8), (2, 6, 2, 8), (1, 2, 2, 8))
    bias, joined = attn_bias.BlockDiagonalMask.from_tensor_list(tensors)
    parts = bias.split(xops.fmha.memory_efficient_attention(joined, joined, joined, attn_bias=bias))
    assert [x.shape for x in parts] == [x.shape for x in tensors]
    for x, part in zip(tensors, parts, strict=True):
        near(part, fg.attention(x, x, x, layout="bshd"))
    keys = make("cpu", (1, 4, 2, 8), (2, 5, 2, 8), (1, 3, 2, 8))
    bias, q, k, v = attn_bias.BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys, keys)
    parts = bias.split_queries(xops.memory_efficient_attention(q, k, v, bias))
    near(parts[1], fg.attention(tensors[1], keys[1], keys[1], layout="bshd"))
    assert torch.equal(bias.split_kv(k)[1], keys[1])


def test_xformers_dropout_and_errors():
    q, = make("cpu", (1, 9, 2, 8))
    torch.manual_seed(3)
    first = xops.memory_efficient_attention(q, q, q, p=0.4)
    torch.manual_seed(3)
    assert torch.equal(fg.attention(q, q, q, dropout_p=0.4, layout="bshd"), first)
    with pytest.raises(NotImplementedError, match="attn_bias is SimpleNamespace"):
        xops.memory_efficient_attention(q, q, q, types.SimpleNamespace())
    with pytest.raises(ValueError, match="of one, which holds"):
        bias = attn_bias.BlockDiagonalMask.from_seqlens([9], device="cpu")
        xops.memory_efficient_attention(*[q.expand(2, 9, 2, 8)] * 3, bias)
    with pytest.raises(ValueError, match="query, key and value are"):
        xops.memory_efficient_attention(q, q[0], q)
    for call, text in (
        (lambda: attn_bias.LocalAttentionFromBottomRightMask(-1, 0), "window_left is -1, window_right 0: both must be at"),
        (lambda: attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(0), "window_size is 0: it must be at"),
        (lambda: attn_bias.BlockDiagonalMask.from_seqlens([1], device="cpu").make_local_attention(0), "window_size is 0"),
        (lambda: attn_bias.BlockDiagonalMask.from_seqlens([1], [1, 2]), "q_seqlen has 1 sequences and kv_seqlen 2: both must"),
        (lambda: attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]), r"kv_seqlen is \[3\] and kv_padding 2: no"),
        (lambda: attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [3]), "have 1, 1 and 1 entries: the last must"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
