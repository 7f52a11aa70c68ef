"""flash_attn_with_kvcache and block tables in flashgqa.torch, against sequences put together one by one."""


import pytest

torch = pytest.importorskip("torch")

from torch_tools import DEVICES, arguments_of, gradients, near, on_devices, randn, seeded, tables, turned  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402
from flashgqa import _torch_kvcache  # noqa: E402
from flashgqa.torch import fa3  # noqa: E402

LENS, SLOTS, PAGE = [5, 0, 11], 20, 4
TABLE = torch.tensor([[3, 9, 1, 11, 14], [0, 8, 2, 12, 13], [5, 10, 7, 4, 6]], dtype=torch.int32)


def make(device, *shape):
    return randn(*shape, dtype=DEVICES[device][0], device=device, grad=False)


def angles(device, count=SLOTS, pairs=4):
    return tables(count, 2 * pairs, DEVICES[device][0], device)


def attended(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, chunk=0, pad=0):
    """One sequence, [s, h, d]: out, lse [h, s]. The last query stands at the last key."""
    sq, sk, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    row, key = torch.arange(sq, device=q.device)[:, None] + sk - sq, torch.arange(sk, device=q.device)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (row - key).abs()
    left, right = window
    seen = (key >= pad) & (row >= 0 if causal or left >= 0 else True) & torch.ones_like(row - key, dtype=torch.bool)
    seen &= key <= row if causal else key <= row + right if right >= 0 else True
    seen &= key >= row - left if left >= 0 else True
    if chunk:
        seen &= torch.div(row, chunk, rounding_mode="floor") == key // chunk
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def rotated(x, start, interleaved, step=1):
    positions = start + step * torch.arange(x.shape[0])
    return turned(x.cpu(), positions, 8, interleaved).to(x.device, x.dtype)


CASES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(3, 1)),
    "softcap": dict(softcap=4.0, causal=True),
    "alibi": dict(alibi_slopes=True, causal=True),
}


@on_devices
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sq, new", [(1, 1), (3, 3), (2, 4), (3, 0)])
@pytest.mark.parametrize("paged", [False, True])
def test_with_kvcache(device, name, sq, new, paged):
    q, k, v = make(device, 3, sq, 4, 8), make(device, 3, new, 2, 8), make(device, 3, new, 2, 8)
    whole_k, whole_v = make(device, 3, SLOTS, 2, 8), make(device, 3, SLOTS, 2, 8)
    for n, length in enumerate(LENS):
        whole_k[n, length:] = torch.nan      # slots that are not in use are never read
    options, table = dict(CASES[name]), TABLE.to(device)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], device=device) if options.pop("alibi_slopes", False) else None
    if paged:
        k_cache, v_cache = make(device, 15, PAGE, 2, 8), make(device, 15, PAGE, 2, 8)
        for cache, whole in ((k_cache, whole_k), (v_cache, whole_v)):
            cache[table.long()] = whole.unflatten(1, (-1, PAGE))
    else:
        k_cache, v_cache = whole_k.clone(), whole_v.clone()
    lens, added = torch.tensor(LENS, dtype=torch.int32, device=device), dict(k=k, v=v) if new else {}
    given = dict(**added, cache_seqlens=lens, block_table=table if paged else None, alibi_slopes=slopes, **options)
    out, lse = fg.flash_attn_with_kvcache(q, k_cache, v_cache, **given, return_softmax_lse=True)
    assert lens.tolist() == LENS
    stored = (k_cache[table.long()].flatten(1, 2), v_cache[table.long()].flatten(1, 2)) if paged else (k_cache, v_cache)
    for n, length in enumerate(LENS):
        end = length + new
        whole_k[n, length:end], whole_v[n, length:end] = k[n], v[n]
        rule = {"causal": options.get("causal", False), "window": options.get("window_size", (-1, -1))}
        expected = attended(
            q[n], whole_k[n, :end], whole_v[n, :end], **rule, softcap=options.get("softcap", 0), slopes=slopes
        )
        near(out[n], expected[0], device)
        near(lse[n], expected[1].to(lse.dtype), device)
        assert torch.equal(stored[0][n, :end], whole_k[n, :end]) and torch.equal(stored[1][n, :end], whole_v[n, :end])
    again = fg.flash_attn_with_kvcache(q, k_cache, v_cache, **given, num_splits=3)
    assert torch.equal(again, out)


@on_devices
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window_size=(4, -1))], ids=str)
@pytest.mark.parametrize("sq, new", [(1, 1), (3, 3), (2, 3)])
def test_with_kvcache_and_rotary(device, interleaved, options, sq, new):
    q, k, v = make(device, 3, sq, 4, 8), make(device, 3, new, 2, 8), make(device, 3, new, 2, 8)
    k_cache, v_cache = make(device, 5, SLOTS, 2, 8), make(device, 5, SLOTS, 2, 8)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    lens, (cos, sin) = torch.tensor(LENS, dtype=torch.int32, device=device), angles(device)
    before, kept = [x.clone() for x in (q, k)], k_cache.clone()
    out = fg.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=lens, cache_batch_idx=rows, rotary_interleaved=interleaved, **options
    )
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    for n, length in enumerate(LENS):
        row, end = int(rows[n]), length + new
        near(k_cache[row, length:end], rotated(k[n], length, interleaved), device)
        turned_q = rotated(q[n], length, interleaved, step=1 if options else 0)
        rule = {"causal": options.get("causal", False), "window": options.get("window_size", (-1, -1))}
        near(out[n], attended(turned_q, k_cache[row, :end], v_cache[row, :end], **rule)[0], device)
        kept[row, length:end] = k_cache[row, length:end]
    assert torch.equal(k_cache, kept)


@on_devices
def test_with_kvcache_int_lengths_left_pad_and_whole_cache(device):
    q, k_cache, v_cache = make(device, 3, 2, 4, 8), make(device, 3, 9, 2, 8), make(device, 3, 9, 2, 8)
    k_cache[2, :3] = torch.nan
    pad = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    out = fg.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7, cache_leftpad=pad, causal=True)
    for n in range(3):
        near(out[n], attended(q[n], k_cache[n, :7].nan_to_num(), v_cache[n, :7], causal=True, pad=int(pad[n]))[0], device)
    out = fg.flash_attn_with_kvcache(q[:2], k_cache[:2], v_cache[:2])
    near(out[1], attended(q[1], k_cache[1], v_cache[1])[0], device)
    pages = make(device, 6, 3, 2, 8)
    table = torch.tensor([[4, 0], [5, 1]], dtype=torch.int32, device=device)
    out = fg.flash_attn_with_kvcache(q[:2], pages, pages, block_table=table)
    near(out[0], attended(q[0], pages[[4, 0]].flatten(0, 1), pages[[4, 0]].flatten(0, 1))[0], device)


@on_devices
@pytest.mark.parametrize("causal", [False, True])
def test_fa3_with_kvcache_of_packed_rows(device, causal):
    rows_q, rows_new, lens, chunk = [3, 1, 2], [3, 0, 4], [5, 6, 11], 8
    cu_q, cu_new = (torch.tensor([0, *x], device=device).cumsum(0, dtype=torch.int32) for x in (rows_q, rows_new))
    q, k, v = make(device, 6, 4, 8), make(device, 7, 2, 8), make(device, 7, 2, 8)
    k_cache, v_cache = make(device, 15, PAGE, 2, 8), make(device, 15, PAGE, 2, 8)
    table, (cos, sin) = TABLE.to(device), angles(device)
    starts = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    out, lse, *rest = fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, rotary_seqlens=starts, page_table=table, cu_seqlens_q=cu_q,
        cache_seqlens=torch.tensor(lens, dtype=torch.int32, device=device), cu_seqlens_k_new=cu_new, max_seqlen_q=3,
        causal=causal, attention_chunk=chunk if causal else 0, return_softmax_lse=True,
    )  # fmt: skip
    assert [x.numel() for x in rest] == [0, 0]
    for n, (a, b, c, d) in enumerate(zip(cu_q, cu_q[1:], cu_new, cu_new[1:], strict=False)):
        whole_k, whole_v = (x[table[n].long()].flatten(0, 1)[: lens[n] + rows_new[n]] for x in (k_cache, v_cache))
        near(whole_k[lens[n] :], rotated(k[c:d], int(starts[n]), True), device)
        assert torch.equal(whole_v[lens[n] :], v[c:d])
        turned_q = rotated(q[a:b], int(starts[n]), True, step=int(causal))
        expected = attended(turned_q, whole_k, whole_v, causal=causal, chunk=chunk if causal else 0)
        near(out[a:b], expected[0], device)
        near(lse[:, a:b], expected[1].to(lse.dtype), device)


@on_devices
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_with_block_table(device, causal):
    lengths_q, lengths_k = [3, 0, 5], [6, 4, 17]
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0, dtype=torch.int32) for x in (lengths_q, lengths_k))
    q, table = make(device, 8, 4, 8), TABLE.to(device)
    k, v = make(device, 15, PAGE, 2, 8), make(device, 15, PAGE, 2, 8)
    options = dict(causal=causal, block_table=table, return_attn_probs=True)
    out, lse, nothing = fg.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 17, **options)
    assert nothing is None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    recorded, recorded_lse, _ = fg.flash_attn_varlen_func(*leaves, cu_q, cu_k, 5, 17, **options)
    near(recorded, out, device)
    near(recorded_lse, lse, device)
    expected = []
    for n in range(3):
        keys, values = (x[table[n].long()].flatten(0, 1)[: lengths_k[n]] for x in leaves[1:])
        expected.append(attended(leaves[0][cu_q[n] : cu_q[n + 1]], keys, values, causal=causal)[0])
    expected = torch.cat(expected)
    near(out, expected, device)
    for a, b in zip(gradients((recorded,), leaves), gradients((expected,), leaves), strict=True):
        near(a, b, device)


WITH_KVCACHE = "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, \
cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, \
rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
FA3_WITH_KVCACHE = "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, \
cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, \
rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), \
attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, \
return_softmax_lse=False"


def test_out_of_memory_is_torchs_error(monkeypatch):
    def fail(*_, **__):
        raise MemoryError("a workspace of 5 bytes")

    monkeypatch.setattr(_torch_kvcache, "attention_with_kvcache", fail)
    q, cache = make("cpu", 2, 1, 4, 8), make("cpu", 2, 9, 2, 8)
    with pytest.raises(torch.OutOfMemoryError, match="a workspace of 5 bytes"):
        fg.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=2)


def test_signatures_and_errors():
    assert arguments_of(fg.flash_attn_with_kvcache) == f"({WITH_KVCACHE})"
    assert arguments_of(fa3.flash_attn_with_kvcache) == f"({FA3_WITH_KVCACHE})"
    q, cache = make("cpu", 2, 1, 4, 8), make("cpu", 2, 9, 2, 8)
    new = make("cpu", 2, 1, 2, 8)
    with pytest.raises(ValueError, match="k and v: both must be given"):
        fg.flash_attn_with_kvcache(q, cache, cache, new, cache_seqlens=2)
    with pytest.raises(ValueError, match="k and v are given without cache_seqlens"):
        fg.flash_attn_with_kvcache(q, cache, cache.clone(), new, new)
    with pytest.raises(ValueError, match="rotary_cos is given without rotary_sin"):
        fg.flash_attn_with_kvcache(q, cache, cache, rotary_cos=new, cache_seqlens=2)
    with pytest.raises(ValueError, match="rotary_cos is given without k and v"):
        fg.flash_attn_with_kvcache(q, cache, cache, rotary_cos=new, rotary_sin=new, cache_seqlens=2)
    with pytest.raises(ValueError, match="cu_seqlens_q is given without max_seqlen_q"):
        fa3.flash_attn_with_kvcache(q[0], cache, cache, cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32))
    kept = cache.clone()
    with pytest.raises(ValueError, match="slots"):
        fg.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=9)
    assert torch.equal(cache, kept)
    out = fg.flash_attn_with_kvcache(q.requires_grad_(), cache, cache.clone(), new, new, cache_seqlens=2)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "gathered"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seqlens_q=ints(0, 3, 5)), "cu_seqlens_q (goes from 0 to|ends at) 5 .* q has 7 rows"),
        (dict(cu_seqlens_q=ints(1, 3, 7)), r"cu_seqlens_q(\[0\] is| goes from) 1"),
        (dict(block_table=torch.tensor([[0, 9], [2, 3]], dtype=torch.int32)), "9 .* 4 pages"),
        (dict(cu_seqlens_k=ints(0, 4, 14), max_seqlen_k=10), "slots"),
    ],
    ids=["rows left over", "rows before", "no such page", "too few columns"],
)
def test_contents_that_do_not_fit_a_block_table(change, message, grad):
    q, pages = make("cpu", 7, 4, 8).requires_grad_(grad), make("cpu", 4, 3, 2, 8)
    given = dict(
        cu_seqlens_q=ints(0, 3, 7), cu_seqlens_k=ints(0, 4, 9), max_seqlen_q=4, max_seqlen_k=5,
        block_table=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    )  # fmt: skip
    assert fg.flash_attn_varlen_func(q, pages, pages, **given).shape == (7, 4, 8)
    with pytest.raises(ValueError, match=message):
        fg.flash_attn_varlen_func(q, pages, pages, **given | change)


def test_contents_that_do_not_fit_flash_attention_3():
    q, k, lens = make("cpu", 7, 4, 8), make("cpu", 9, 2, 8), (ints(0, 3, 7), ints(0, 4, 9), 4, 5)
    for used, message in (
        (dict(seqused_k=ints(5, 5)), r"seqused_k\[0\] is 5 and sequence 0 has 4 rows"),
        (dict(seqused_q=ints(3, -1)), r"seqused_q\[1\] is -1 and sequence 1 has 4 rows"),
        (dict(seqused_q=ints(3)), r"seqused_q is \[1\]: it must be \[b\] = \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fa3.flash_attn_varlen_func(q, k, k, *lens, **used)
    cache = make("cpu", 2, 20, 2, 8)
    for given, message in (
        (dict(cu_seqlens_q=ints(0, 3, 6), max_seqlen_q=4), "cu_seqlens_q goes from 0 to 6 and q has 7 rows"),
        (
            dict(k=k, v=k, cu_seqlens_k_new=ints(0, 4, 8), cu_seqlens_q=lens[0], max_seqlen_q=4),
            "cu_seqlens_k_new goes from 0 to 8 and k has 9 rows",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fa3.flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=ints(3, 5), **given)
