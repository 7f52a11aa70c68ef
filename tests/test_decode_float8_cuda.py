"""float8 e4m3 caches in the decode kernels for Hopper (csrc/cuda/sm90/dec_float8.cuh): exact elements, scales of KV heads."""
import itertools
import math

import pytest
import torch
from decode_formula import agree, attend, of_each_head

import flashgqa

ROWS = [row["name"] for row in flashgqa.kernels() if row["name"].endswith("f8") and row["available"]]
pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def inputs(b, hk, g, sq, slots, lens, d=128, dv=None, dtype=torch.bfloat16, seed=0):
    """q and a float8 cache of all magnitudes up to 448, NaN in slots that hold no key; scales that bring it back to 1."""
    generator = torch.Generator("cuda").manual_seed(seed + slots + d)
    q = torch.randn(b, hk * g, sq, d, generator=generator, device="cuda").to(dtype)
    beyond = (torch.arange(slots, device="cuda") >= lens[:, None])[:, None, :, None]
    kv = [torch.randn(b, hk, slots, n, generator=generator, device="cuda") * 60 for n in (d, dv or d)]
    kv = [x.clamp(-448, 448).masked_fill(beyond, math.nan).to(FLOAT8) for x in kv]
    scales = [2.0 ** torch.randint(-8, -4, (b, hk), generator=generator, device="cuda") for _ in range(2)]
    return q, *kv, {"cache_lens": lens, "k_scale": scales[0], "v_scale": scales[1]}


def formula(q, k, v, dtype, cache_lens, k_scale=None, v_scale=None, causal=False, window=(None, None), sink=None, left_pad=None,
            softcap=None, alibi_slopes=None):
    """out and LSE, computed in `dtype`, softcap and ALiBi at least in float32; slots without a key are not looked at."""
    (b, hq, sq, d), (hk, slots) = q.shape, k.shape[1:3]
    j, diag = torch.arange(slots, device="cuda"), torch.arange(sq, device="cuda")[None] + cache_lens[:, None] - sq
    seen = (j < cache_lens[:, None, None]) & ((j <= diag[..., None]) | torch.tensor(not causal, device="cuda"))
    if left_pad is not None:
        seen &= j >= left_pad[:, None, None]
    if window[0] is not None:
        seen &= j >= diag[..., None] - window[0]
    some = seen.any(1)[:, None, :, None]
    scales = [torch.ones(b, hk, device="cuda") if x is None else x.expand(b, hk) for x in (k_scale, v_scale)]
    wide = [x.double() * s[:, :, None, None] for x, s in zip((k, v), scales, strict=True)]
    k, v = (torch.where(some, x, 0).to(dtype) for x in wide)
    seen = seen[:, None, None]
    x = of_each_head(q.to(dtype).view(b, hk, hq // hk, sq, d), k.transpose(-1, -2)) * d**-0.5
    return attend(x, v, seen, (diag[..., None] - j).abs(), dtype, sink, softcap, alibi_slopes)


def check(q, k, v, options, invariant=False, kernel=None):
    assert flashgqa.explain_with_kvcache(q, k, v, **options, batch_invariant=invariant)["kernel"] == (kernel or kernel_of(q, k))
    out, lse = flashgqa.attention_with_kvcache(q, k, v, **options, batch_invariant=invariant, return_lse=True)
    again = flashgqa.attention_with_kvcache(q, k, v, **options, batch_invariant=invariant, out=torch.full_like(out, math.nan))
    assert torch.equal(out, again)
    exact, exact_lse = formula(q, k, v, torch.float64, **options)
    agree(out, lse, exact, exact_lse, formula(q, k, v, q.dtype, **options)[0])
    return out


def kernel_of(q, k):
    short = "bf16" if q.dtype == torch.bfloat16 else "f16"
    wide = "wide" if q.shape[1] // k.shape[1] * q.shape[2] > 8 else ""
    return f"fwd_sm90_{short}_d128_dv128_decode{wide}f8"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [8, 16, 32, 64, 128])
def test_every_element_exactly(g, dtype):
    """One key: its value is the result, its product with a row of q that is 0 but in one place the LSE."""
    b, hk = 4, 2
    every = torch.arange(256, device="cuda").to(torch.uint8).view(1, 256)
    order = torch.stack([torch.randperm(256, generator=torch.Generator("cuda").manual_seed(n), device="cuda") for n in range(b)])
    rows = every.expand(b, 256).gather(1, order).view(b, hk, 128)
    k, v = (torch.full((b, hk, 300, 128), math.nan, device="cuda").to(FLOAT8) for _ in range(2))
    finite = torch.where(rows & 127 == 127, 0, rows)            # 0 * NaN
    k.view(torch.uint8)[:, :, 0], v.view(torch.uint8)[:, :, 0] = finite, rows.flip(0)
    value = v[:, :, :1].to(dtype).expand(b, hk, g, 128)
    sizes = (1.0, 2.0**-60, 2.0**90) if dtype == torch.bfloat16 else (1.0, 2.0**-14)
    for first, size in itertools.product(range(0, 128, g), sizes):
        q = torch.zeros(b, hk, g, 128, device="cuda")
        q[:, :, :, first:first + g] = torch.eye(g, device="cuda") * size
        q = q.view(b, hk * g, 1, 128).to(dtype)
        out, lse = flashgqa.attention_with_kvcache(q, k, v, cache_lens=1, scale=1 / size, return_lse=True)
        assert torch.equal(lse.view(b, hk, g), finite.view(FLOAT8).float()[:, :, first:first + g])
        torch.testing.assert_close(out.view(b, hk, g, 128), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 2, 3, 4, 5, 7, 8, 9, 16, 32, 71])
def test_groups_and_lengths(g, dtype):
    for slots, invariant in itertools.product((257, 1000, 4097), (False, True)):
        for lens in (int32([slots]), int32([slots, 0, slots // 2, 1, 15, 17])):
            check(*inputs(len(lens), 2, g, 1, slots, lens, dtype=dtype), invariant)


@pytest.mark.parametrize(("sq", "g"), [(2, 1), (2, 4), (4, 2), (8, 1), (4, 4), (16, 1), (8, 9), (3, 40)])
def test_rows_masks_sink_and_left_padding(sq, g):
    for slots, window in itertools.product((300, 2500), ((None, None), (100, None), (700, None))):
        lens = int32([slots, 3, 0, slots - 1])
        q, k, v, options = inputs(4, 2, g, sq, slots, lens)
        options |= {"causal": True, "window": window}
        check(q, k, v, options)
        check(q, k, v, options | {"sink": torch.linspace(-2, 2, 2 * g, device="cuda"), "left_pad": int32([77, 2, 0, slots - 2])})


@pytest.mark.parametrize(("sq", "g"), [(129, 1), (65, 2), (40, 8), (7, 71), (300, 4)])
def test_more_rows_than_a_block_holds(sq, g):
    """Blocks of rows take turns where no copy of the cache is made: with batch_invariant, softcap beside scales, few rows."""
    lens = int32([2500, sq, 0, 1300])
    for dtype, window in itertools.product(DTYPES, ((None, None), (400, None))):
        q, k, v, options = inputs(4, 2, g, sq, 2500, lens, dtype=dtype)
        options |= {"causal": True, "window": window, "left_pad": int32([77, 2, 0, 1290])}
        copied = kernel_of(q, k).replace("decodewidef8", "plain") if sq * g > 256 and g < 71 else None
        check(q, k, v, options, True)
        check(q, k, v, options, kernel=copied)
        check(q, k, v, options | {"k_scale": options["k_scale"] * 1.4, "v_scale": options["v_scale"] * 0.7}, kernel=copied)
        check(q, k, v, options | {"softcap": 30.0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sq", "g"), [(1, 4), (2, 4), (1, 16), (1, 32), (4, 16), (3, 40)])
def test_softcap_and_alibi(sq, g, dtype):
    slopes, lens = 2.0 ** -torch.linspace(1, 9, 2 * g, device="cuda"), int32([1500, 700, 3, 0])
    q, k, v, options = inputs(4, 2, g, sq, 1500, lens, dtype=dtype)
    options |= {"causal": True}
    check(4 * q, k, v, options | {"softcap": 2.0})
    check(q, k, v, options | {"alibi_slopes": slopes})
    more = {"window": (600, None), "sink": torch.linspace(-2, 2, 2 * g, device="cuda"), "left_pad": int32([77, 0, 1, 0])}
    check(4 * q, k, v, options | more | {"softcap": 5.0, "alibi_slopes": slopes / 4}, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(8, 8), (40, 64), (64, 64), (72, 128), (128, 96)])
@pytest.mark.parametrize("g", [4, 16])
def test_head_dims_and_layouts(g, d, dv, dtype):
    """Rows that do not start on 16 bytes are for another kernel; so are elements that lie apart."""
    lens = int32([700, 513])
    q, k, v, options = inputs(2, 3, g, 1, 700, lens, d, dv, dtype)
    if d % 16 or dv % 16:
        plan = flashgqa.explain_with_kvcache(q, k, v, **options)
        assert plan["kernel"].endswith("cache") and dict(plan["refused"])[kernel_of(q, k)] == "k: rows must start on 16 bytes"
        padded = [torch.nn.functional.pad(x.view(torch.uint8), (0, -n % 16)) for x, n in ((k, d), (v, dv))]
        k, v = (x.view(FLOAT8)[..., :n] for x, n in zip(padded, (d, dv), strict=True))
    out = check(q, k, v, options)
    turned = [x.view(torch.uint8).transpose(1, 2) if x is not q else x.transpose(1, 2) for x in (q, k, v)]
    if d % 16 == dv % 16 == 0:
        turned = [x.contiguous() for x in turned]
    turned = [turned[0], *(x.view(FLOAT8) for x in turned[1:])]
    assert torch.equal(flashgqa.attention_with_kvcache(*turned, **options, layout="bshd").transpose(1, 2), out)


@pytest.mark.parametrize("page", [16, 48, 64, 256])
def test_pages_and_new_keys(page):
    """In any order, NaN in what no sequence holds, 2^30 for pages that are not in use; three keys are appended first."""
    b, hk, new, slots = 3, 2, 3, 960
    per = -(-slots // page)
    lens = int32([900, 0, 513])
    for g, sq in ((1, 1), (4, 2), (7, 1), (8, 1), (8, 4), (8, 12)):
        q, k, v, options = inputs(b, hk, g, sq, per * page, lens)
        table = torch.randperm(b * per, generator=torch.Generator("cuda").manual_seed(page), device="cuda").view(b, per)
        pages = []
        for x in (k, v):
            cut = x.view(torch.uint8).view(b, hk, per, page, 128).transpose(1, 2).reshape(-1, hk, page, 128)
            pages.append(torch.empty_like(cut))
            pages[-1][table.view(-1)] = cut
            pages[-1] = pages[-1].view(FLOAT8)
        unused = torch.arange(per, device="cuda") * page >= lens[:, None] + new
        options["page_table"] = torch.where(unused, 1 << 30, table).to(torch.int32)
        added = [torch.randn(b, hk, new, 128, device="cuda").to(q) for _ in range(2)]
        options["causal"] = True
        out, lse = flashgqa.attention_with_kvcache(q, *pages, *added, **options, return_lse=True, kernel=kernel_of(q, k))
        del options["page_table"]
        whole = flashgqa.attention_with_kvcache(q, k, v, *added, **options)         # k and v hold the new keys, too, now
        options["cache_lens"] = lens + new
        exact, exact_lse = formula(q, k, v, torch.float64, **options)
        agree(out, lse, exact, exact_lse, formula(q, k, v, q.dtype, **options)[0])
        assert torch.equal(whole, out)


@pytest.mark.parametrize("g", [4, 16])
def test_scales_of_heads_alone_and_none(g):
    lens = int32([800, 33])
    q, k, v, options = inputs(2, 2, g, 1, 800, lens)
    together = options | {name: options[name][:1].expand(2, 2).contiguous() for name in ("k_scale", "v_scale")}
    alone = options | {name: options[name][0] for name in ("k_scale", "v_scale")}
    assert torch.equal(check(q, k, v, together), flashgqa.attention_with_kvcache(q, k, v, **alone))
    check(q, k, v, {"cache_lens": lens, "v_scale": torch.tensor([0.3, 1.7], device="cuda")})
    check(q / 64, k, v, {"cache_lens": lens})


@pytest.mark.parametrize("g", [8, 32, 100])
def test_wide_range_of_q(g):
    """Elements of a row of q far below its largest one still count, and inf and NaN stay with their row."""
    lens = int32([900])
    q, k, v, options = inputs(1, 1, g, 1, 900, lens)
    q *= 2.0 ** torch.randint(-20, 1, q.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    q[0, 1] *= 2.0**-100
    check(q, k, v, options)
    clean = flashgqa.attention_with_kvcache(q, k, v, **options)
    q[0, 3, 0, 5], q[0, 6, 0, 7] = math.inf, math.nan
    out = flashgqa.attention_with_kvcache(q, k, v, **options)
    others = [h for h in range(g) if h not in (3, 6)]
    assert out[0, [3, 6]].isnan().all() and torch.equal(out[0, others], clean[0, others])


@pytest.mark.parametrize(("sq", "g"), [(2, 1), (2, 4), (4, 2), (4, 8), (8, 8), (8, 16)])
def test_nan_reaches_only_rows_that_see_it(sq, g):
    q, k, v, options = inputs(1, 1, g, sq, 900, int32([900]))
    clean = flashgqa.attention_with_kvcache(q, k, v, **options, causal=True)
    v.view(torch.uint8)[0, 0, 899, [5, 76]] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8, device="cuda")
    out = flashgqa.attention_with_kvcache(q, k, v, **options, causal=True)
    assert torch.equal(out[:, :, :-1], clean[:, :, :-1])
    assert (out[0, :, -1].isnan() == torch.isin(torch.arange(128, device="cuda"), int32([5, 76]))).all()
    k.view(torch.uint8)[0, 0, 3] = 0x7F
    assert flashgqa.attention_with_kvcache(q, k, v, **options, causal=True).isnan().all()


@pytest.mark.parametrize("g", [4, 16])
def test_batch_invariant_rows_do_not_depend_on_the_batch(g):
    lens = int32([3000, 17, 2000, 1024, 1025, 0])
    q, k, v, options = inputs(6, 2, g, 1, 3000, lens)
    together = flashgqa.attention_with_kvcache(q, k, v, **options, batch_invariant=True)
    for n in range(6):
        own = {name: x[n:n + 1] for name, x in options.items()}
        alone = flashgqa.attention_with_kvcache(q[n:n + 1], k[n:n + 1], v[n:n + 1], **own, batch_invariant=True)
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("g", [4, 16])
def test_one_graph_serves_all_lengths_and_scales(g):
    lens = int32([5, 1])
    q, k, v, options = inputs(2, 2, g, 1, 3000, int32([3000, 3000]))
    options["cache_lens"] = lens
    graph = torch.cuda.CUDAGraph()
    flashgqa.attention_with_kvcache(q, k, v, **options)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = flashgqa.attention_with_kvcache(q, k, v, **options)
    for pair in ((3000, 1), (1, 2999), (1500, 1500), (0, 3000)):
        lens.copy_(int32(pair))
        options["k_scale"].mul_(1.5)
        graph.replay()
        assert torch.equal(out, flashgqa.attention_with_kvcache(q, k, v, **options))


def test_refusals_say_why():
    q, k, v, options = inputs(1, 2, 4, 1, 1000, int32([1000]))

    def refused(reason, q, k, v, **more):
        with pytest.raises(NotImplementedError, match=reason):
            flashgqa.attention_with_kvcache(q, k, v, **options | more, kernel=ROWS[0])

    refused("up to 8 query rows", q.expand(1, 8, 3, 128), k, v)
    refused("pages of a multiple of 16", q, *(x.view(-1, 2, 8, 128) for x in (k, v)), page_table=int32([range(125)]))
    options = {"cache_lens": options["cache_lens"]}
    refused("for float8 KV caches only", q, k.to(q), v.to(q))
