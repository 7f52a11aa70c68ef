"""The decode kernels for Hopper (csrc/cuda/sm90/decode.cu, decode_wide.cu): few query rows over many keys, which blocks share."""
import itertools
import math

import pytest
import torch
from decode_formula import agree, attend, of_each_head
from gpu import assert_alike

import flashgqa

ROWS = [row["name"] for row in flashgqa.kernels() if row["name"].endswith(("decode", "decodewide")) and row["available"]]
pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def inputs(b, hk, g, sq, sk, d=128, dv=None, dtype=torch.bfloat16, lens=None):
    """NaN where no sequence has keys."""
    q, k, v = (random(b, h, s, n, dtype=dtype, seed=h + s + n) for h, s, n in ((hk * g, sq, d), (hk, sk, d), (hk, sk, dv or d)))
    if lens is not None:
        beyond = (torch.arange(sk, device="cuda") >= lens[:, None])[:, None, :, None]
        k, v = k.masked_fill(beyond, math.nan), v.masked_fill(beyond, math.nan)
    return q, k, v


def formula(q, k, v, dtype, lens=None, causal=False, window=(None, None), sink=None, softcap=None, alibi_slopes=None,
            scale=None):
    """out and LSE, computed in `dtype`; softcap and ALiBi at least in float32."""
    (b, hq, sq, d), (hk, sk) = q.shape, k.shape[1:3]
    lens = torch.full((b,), sk, device="cuda") if lens is None else lens
    j, diag = torch.arange(sk, device="cuda"), torch.arange(sq, device="cuda")[None] + lens[:, None] - sq
    seen = (j < lens[:, None, None]) & ((j <= diag[..., None]) | torch.tensor(not causal, device="cuda"))
    if window[0] is not None:
        seen &= j >= diag[..., None] - window[0]
    seen = seen[:, None, None]
    some = seen.any(3)[:, 0, 0][:, None, :, None]
    k, v = (torch.where(some, x, 0).to(dtype) for x in (k, v))
    x = of_each_head(q.to(dtype).view(b, hk, hq // hk, sq, d), k.transpose(-1, -2)) * (scale or d**-0.5)
    return attend(x, v, seen, (diag[..., None] - j).abs(), dtype, sink, softcap, alibi_slopes)


def check(q, k, v, expected_kernel, **options):
    """As the plain formula, by `agree`; the same bits twice."""
    lens, sink = options.get("kv_lens"), options.get("sink")
    plain = {"lens": lens, "sink": sink, "causal": options.get("causal", False), "window": options.get("window", (None, None)),
             "softcap": options.get("softcap"), "alibi_slopes": options.get("alibi_slopes"), "scale": options.get("scale")}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)
    again = flashgqa.attention(q, k, v, **options, out=torch.full_like(out, math.nan))
    exact, exact_lse = formula(q, k, v, torch.float64, **plain)
    naive, _ = formula(q, k, v, q.dtype, **plain)
    assert flashgqa.explain(q, k, v, **options)["kernel"].endswith(expected_kernel)
    assert torch.equal(out, again)
    agree(out, lse, exact, exact_lse, naive)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 2, 3, 4, 5, 7, 8, 16, 32, 71])
def test_groups_and_lengths(g, dtype):
    """One sequence, and unequal ones of which one is empty; shares of blocks end anywhere."""
    for sk, invariant in itertools.product((257, 1000, 4097), (False, True)):
        for lens in (None, int32([sk, 0, sk // 2, 1, 15, 17])):
            q, k, v = inputs(1 if lens is None else 6, 2, g, 1, sk, dtype=dtype, lens=lens)
            check(q, k, v, "decode" if g <= 8 else "decodewide", kv_lens=lens, batch_invariant=invariant)


@pytest.mark.parametrize(("sq", "g"), [(2, 1), (2, 4), (4, 4), (16, 1), (16, 4), (8, 9), (2, 40), (4, 32), (13, 5), (1, 128)])
def test_rows_masks_and_sink(sq, g):
    for sk, window in itertools.product((300, 2500), ((None, None), (100, None), (700, None))):
        for lens in (None, int32([sk, 3, 0, sk - 1])):
            q, k, v = inputs(1 if lens is None else 4, 2, g, sq, sk, lens=lens)
            sink = None if sk == 300 else torch.linspace(-2, 2, 2 * g, device="cuda")
            check(q, k, v, "decode" if sq * g <= 8 else "decodewide", causal=True, window=window, kv_lens=lens, sink=sink)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(8, 8), (40, 64), (64, 64), (72, 128), (128, 96)])
def test_head_dims_and_strides(d, dv, dtype):
    for g in (4, 16):
        q, k, v = inputs(2, 3, g, 1, 700, d, dv, dtype)
        out = check(q, k, v, "decode" if g == 4 else "decodewide")
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        assert torch.equal(flashgqa.attention(*turned, layout="bshd").transpose(1, 2), out)
        tile = 64 if max(d, dv) <= 64 else 128
        whole = inputs(2, 3, g, 1, 700, tile, tile, dtype)       # records hold whole tiles
        assert flashgqa.explain(q, k, v)["workspace_bytes"] == flashgqa.explain(*whole)["workspace_bytes"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("sq", "g"), [(1, 4), (2, 4), (1, 16), (1, 32), (4, 16), (3, 40)])
def test_softcap_and_alibi(sq, g, d, dtype):
    """Every row and every size of its tiles; alone, together, and with a window, a sink and unequal lengths."""
    kernel = f"d{d}_dv{d}_decode" + ("" if sq * g <= 8 else "wide")
    slopes = 2.0 ** -torch.linspace(1, 9, 2 * g, device="cuda")
    for lens in (None, int32([1500, 700, 2, 0])):
        q, k, v = inputs(1 if lens is None else 4, 2, g, sq, 1500, d, dtype=dtype, lens=lens)
        check(4 * q, k, v, kernel, kv_lens=lens, softcap=2.0)
        check(q, k, v, kernel, kv_lens=lens, alibi_slopes=slopes, causal=True)
        check(4 * q, k, v, kernel, kv_lens=lens, causal=True, window=(600, None), softcap=5.0, alibi_slopes=slopes / 4,
              sink=torch.linspace(-2, 2, 2 * g, device="cuda"), batch_invariant=lens is not None)
        if lens is not None:                                        # a slope for each head of each sequence
            check(q, k, v, kernel, kv_lens=lens, alibi_slopes=slopes * torch.arange(1, 5, device="cuda")[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("sq", "g"), [(1, 17), (1, 32), (2, 16), (3, 7), (4, 8), (3, 13), (2, 32), (5, 13), (4, 32)])
def test_two_blocks_that_share_a_sequence(sq, g, d, dtype):
    """Half as many KV heads as multiprocessors: two blocks have half of one's keys each and exchange sums, also where a row sees
    nothing of one half."""
    b = torch.cuda.get_device_properties(0).multi_processor_count // 2
    kernel = f"fwd_sm90_{'bf16' if dtype == torch.bfloat16 else 'f16'}_d{d}_dv{d}_decodewide"
    forced = {"kernel": kernel} if sq * g > 64 else {}              # by itself the plan takes tiles there
    for sk in (512, 1000, 1024):
        q, k, v = inputs(b, 1, g, sq, sk, d, dtype=dtype)
        k[::3, :, : sk // 2] *= 4
        v[::5, :, sk // 2 + 70:] = 0
        check(q, k, v, kernel, causal=True, **forced)
        check(q, k, v, kernel, causal=True, window=(sk // 3, None), sink=torch.linspace(-2, 2, g, device="cuda"), **forced)
        check(2 * q, k, v, kernel, softcap=3.0, **forced)
    paged = flashgqa.attention_with_kvcache(q, *(x.view(b * sk // 64, 1, 64, d) for x in (k, v)), cache_lens=sk, causal=True,
                                            page_table=torch.arange(b * sk // 64, device="cuda", dtype=torch.int32).view(b, -1))
    assert_alike([paged], [flashgqa.attention(q, k, v, causal=True, **forced)], ["out"])
    v[1, 0, 5, 3], v[2, 0, sk - 5, 4] = math.inf, math.nan
    out = flashgqa.attention(q, k, v, causal=True, **forced)
    assert (out[1, :, :, 3] == math.inf).all() and out[2, :, :, 4].isnan().all()
    out[1, :, :, 3] = out[2, :, :, 4] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("rows", [4, 16, 32, 64])
@pytest.mark.parametrize(("softcap", "scale", "factor"), [
    (3e38, 0.1, 1), (1e38, 1e-5, 150), (1e-30, 1e15, 1), (1e-38, 2e-38, 1), (1.3e-38, 1.3e-38, 1),
    (None, 1.3e-38, 1), (None, 3e38, 0)])
def test_caps_and_scales_at_the_ends_of_float32(rows, softcap, scale, factor):
    """Where the ratio, twice the cap or the power of two leave float32, scores are counted in natural units. Some q.k are 0."""
    q, k, v = inputs(2, 1, rows, 1, 700)
    k[:, :, 1::5] = 0
    check(q * factor, k * factor, v, "decode" if rows == 4 else "decodewide", softcap=softcap, scale=scale)


def test_softcap_of_scores_that_are_not_finite():
    q, k, v = inputs(1, 1, 16, 1, 900)
    q[0, :, 0, 0], k[0, 0, 3, 0] = 1e30, -1e30
    for rows in (4, 16):
        out = flashgqa.attention(q[:, :rows], k, v, softcap=3.0)
        torch.testing.assert_close(out.double(), formula(q[:, :rows], k, v, torch.float64, softcap=3.0)[0], rtol=0, atol=0.02)
    k[0, 0, 3, 0] = math.nan
    assert flashgqa.attention(q, k, v, softcap=3.0).isnan().all()


@pytest.mark.parametrize("page", [16, 48, 64, 256])
def test_pages(page):
    """In any order, NaN in what no sequence holds, numbers of other pages behind the last one in use: 2^30."""
    for g, sq in ((1, 1), (4, 2), (7, 1), (16, 1), (8, 4), (11, 7)):
        lens = int32([900, 3, 513])
        q, k, v = inputs(3, 2, g, sq, 960, lens=lens)
        per = -(-960 // page)
        table = torch.randperm(3 * per, generator=torch.Generator("cuda").manual_seed(page), device="cuda").view(3, per)
        cut = [torch.nn.functional.pad(x, (0, 0, 0, per * page - 960), value=math.nan) for x in (k, v)]
        cut = [x.view(3, 2, per, page, 128).transpose(1, 2).reshape(-1, 2, page, 128) for x in cut]
        pages = [torch.empty_like(x) for x in cut]
        for to, x in zip(pages, cut, strict=True):
            to[table.view(-1)] = x
        unused = torch.arange(per, device="cuda") * page >= lens[:, None]
        options = {"cache_lens": lens, "page_table": torch.where(unused, 1 << 30, table).to(torch.int32), "causal": True}
        out, lse = flashgqa.attention_with_kvcache(q, *pages, **options, return_lse=True)
        exact, exact_lse = formula(q, k, v, torch.float64, lens, causal=True)
        naive, _ = formula(q, k, v, q.dtype, lens, causal=True)
        agree(out, lse, exact, exact_lse, naive)


def test_cache_whose_elements_lie_apart():
    """The copies of these kernels want them side by side: another kernel reads such a cache."""
    q, k, v = inputs(2, 2, 4, 1, 700, 256)
    q, k, v, lens = q[..., :128], k[..., ::2], v[..., ::2], int32([700, 300])
    expected = flashgqa.attention_with_kvcache(q, k.contiguous(), v.contiguous(), cache_lens=lens)
    out = flashgqa.attention_with_kvcache(q, k, v, cache_lens=lens)
    assert_alike([out], [expected], ["out"])


@pytest.mark.parametrize(("sq", "g"), [(2, 1), (2, 4), (4, 8), (8, 8), (4, 32), (12, 6)])
def test_inf_and_nan_reach_only_rows_that_see_them(sq, g):
    q, k, v = inputs(1, 1, g, sq, 900)
    clean = flashgqa.attention(q, k, v, causal=True)
    v[0, 0, 899, 5], v[0, 0, 899, 77], v[0, 0, 899, 9] = math.nan, math.inf, -math.inf
    out = flashgqa.attention(q, k, v, causal=True)
    assert torch.equal(out[:, :, :-1], clean[:, :, :-1])
    last = out[0, :, -1]
    assert last[:, 5].isnan().all() and (last[:, 77] == math.inf).all() and (last[:, 9] == -math.inf).all()
    k[0, 0, 3] = math.nan
    assert flashgqa.attention(q, k, v, causal=True).isnan().all()


def test_batch_invariant_rows_do_not_depend_on_the_batch():
    lens = int32([3000, 17, 2000, 1024, 1025, 0])
    for g in (4, 16):
        q, k, v = inputs(6, 2, g, 1, 3000, lens=lens)
        together = flashgqa.attention(q, k, v, kv_lens=lens, batch_invariant=True)
        for n in range(6):
            alone = flashgqa.attention(q[n:n + 1], k[n:n + 1], v[n:n + 1], kv_lens=lens[n:n + 1], batch_invariant=True)
            assert torch.equal(alone[0], together[n])


def test_batch_invariant_rows_of_many_chunks():
    """The order in which 20, 10 or 3 of them are added up depends neither on how many sequences there are nor on who adds: blocks
    that share a sequence, or the one that has all of it, few in its registers."""
    for g, (b, sk) in itertools.product((4, 16, 32), ((64, 20000), (140, 9500), (140, 2500), (128, 2048))):
        q, k, v = inputs(b, 1, g, 1, sk)
        together = flashgqa.attention(q, k, v, batch_invariant=True)
        for n in (1, 3, 16):
            few = flashgqa.attention(q[:n], k[:n], v[:n], batch_invariant=True)
            assert torch.equal(few, together[:n])


@pytest.mark.parametrize("g", [4, 16, 32])
def test_chunks_of_whole_sequences(g):
    """More sequences than blocks: of some, chunks are added up where they were made; lengths differ, one has none."""
    lens = int32([2100 - 7 * n for n in range(135)] + [0])
    q, k, v = inputs(136, 1, g, 1, 2100, lens=lens)
    sink = torch.linspace(-2, 2, g, device="cuda")
    check(q, k, v, "decode" if g <= 8 else "decodewide", kv_lens=lens, batch_invariant=True, sink=sink)


@pytest.mark.parametrize(("sq", "g"), [(1, 4), (2, 4), (1, 32)])
def test_blocks_with_several_sequences(sq, g):
    """A block has one head of sequences far from each other; lengths on the device of equally many granules, or none."""
    for b, hk in ((64, 8), (250, 1), (256, 1), (33, 8)):
        lens = int32([300 - n % 40 for n in range(b)])
        q, k, v = inputs(b, hk, g, sq, 300, lens=lens)
        for window in ((None, None), (100, 0)):
            check(q, k, v, "decode" if sq * g <= 8 else "decodewide", kv_lens=lens, causal=True, window=window)
        full = torch.full_like(lens, 300)
        q, k, v = inputs(b, hk, g, sq, 300)
        check(q, k, v, "decode" if sq * g <= 8 else "decodewide", causal=True)
        for invariant in (False, True):
            assert torch.equal(flashgqa.attention(q, k, v, kv_lens=full, causal=True, batch_invariant=invariant),
                               flashgqa.attention(q, k, v, causal=True, batch_invariant=invariant))


@pytest.mark.parametrize("sk", [3000, 40000])
def test_one_graph_serves_all_lengths(sk):
    """Lengths are read on the device: a graph recorded once follows them, by clusters or with the counters of its own."""
    lens = int32([5, 1])
    q, k, v = inputs(2, 2, 16, 1, sk)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    flashgqa.attention(q, k, v, kv_lens=lens)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = flashgqa.attention(q, k, v, kv_lens=lens)
    for pair in ((sk, 1), (1, sk - 1), (sk // 2, sk // 2), (0, sk)):
        lens.copy_(int32(pair))
        graph.replay()
        assert torch.equal(out, flashgqa.attention(q, k, v, kv_lens=lens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sq", "g", "d"), [(1, 4, 128), (2, 4, 64), (1, 16, 128), (1, 32, 64), (3, 8, 128), (4, 32, 128)])
def test_long_caches(sq, g, d, dtype):
    """Too long for a cluster: blocks leave records of their parts, however long these are, and merge them in place."""
    for lens in (None, int32([40000, 3, 0, 12345])):
        q, k, v = inputs(1 if lens is None else 4, 2, g, sq, 40000, d, dtype=dtype, lens=lens)
        kernel = f"{'bf16' if dtype == torch.bfloat16 else 'f16'}_d{d}_dv{d}_decode" + ("" if sq * g <= 8 else "wide")
        forced = {"kernel": f"fwd_sm90_{kernel}"}
        check(q, k, v, kernel, causal=True, kv_lens=lens, **forced)
        sink = torch.linspace(-2, 2, 2 * g, device="cuda")
        check(q, k, v, kernel, causal=True, kv_lens=lens, window=(30001, None), sink=sink, **forced)


@pytest.mark.parametrize(("sq", "g"), [(1, 1), (1, 4), (2, 4), (1, 12), (1, 32), (3, 8)])
@pytest.mark.parametrize(("b", "hk"), [(1, 1), (1, 8), (3, 8), (5, 7), (8, 8), (15, 1)])
def test_short_caches_in_clusters(b, hk, sq, g):
    """A cluster has a pair, of as many blocks as there is room for, also where some have nothing to do."""
    kernel = "decode" if sq * g <= 8 else "decodewide"
    for sk in (257, 1000, 2048):
        lens = int32([(sk, 1, 0, sk // 2, 64, 65)[n % 6] for n in range(b)])
        q, k, v = inputs(b, hk, g, sq, sk)
        sink = torch.linspace(-2, 2, hk * g, device="cuda")
        out = check(q, k, v, kernel, causal=True, sink=sink)
        full = flashgqa.attention(q, k, v, causal=True, sink=sink, kv_lens=torch.full_like(lens, sk))
        assert_alike([full], [out], ["out"])
        q, k, v = inputs(b, hk, g, sq, sk, lens=lens)
        check(q, k, v, kernel, causal=True, kv_lens=lens)
        check(q, k, v, kernel, causal=True, kv_lens=lens, window=(100, None))
    pages, slots = sk // 16, sk // 16 * 16
    table = torch.randperm(b * pages, generator=torch.Generator().manual_seed(0)).to("cuda", torch.int32).view(b, pages)
    paged = [torch.full((b * pages, hk, 16, 128), math.nan, device="cuda", dtype=q.dtype) for _ in range(2)]
    for to, x in zip(paged, (k, v), strict=True):
        to[table.view(-1).long()] = x[:, :, :slots].reshape(b, hk, pages, 16, 128).transpose(1, 2).reshape(-1, hk, 16, 128)
    out = flashgqa.attention_with_kvcache(q, *paged, cache_lens=lens, page_table=table, causal=True)
    assert torch.equal(out, flashgqa.attention(q, k, v, kv_lens=lens, causal=True))


@pytest.mark.parametrize(
    ("b", "hk", "g", "sq", "sk", "lengths"),
    [*((*shape, False) for shape in ((1, 8, 4, 1, 1024), (4, 8, 4, 1, 512), (1, 1, 32, 1, 1024), (1, 8, 4, 1, 60000),
                                     (66, 1, 32, 1, 1024), (40, 8, 4, 1, 300), (2, 1, 32, 2, 30000), (1, 1, 32, 4, 60000),
                                     (16, 1, 32, 4, 2048), (66, 1, 32, 4, 1024))),
     *((*shape, True) for shape in ((1, 8, 4, 1, 1024), (3, 1, 32, 1, 20000), (40, 8, 4, 1, 2000), (2, 1, 32, 2, 30000),
                                    (16, 1, 32, 4, 2048)))],
)
def test_launches_see_what_came_before(b, hk, g, sq, sk, lengths):
    """A launch begins ahead of the end of the one before it: results that are the next one's queries and keys, also by kernels
    of others, and lengths."""
    q, k, v = inputs(b, hk, g, sq, sk)

    def chain(wait):
        x, keys, values = q, k.clone(), v.clone()
        options = {"cache_lens": torch.full((b,), sk - 40, device="cuda", dtype=torch.int32)} if lengths else {}
        attend = flashgqa.attention_with_kvcache if lengths else flashgqa.attention
        for n in range(20):
            x = attend(x, keys, values, **options) * 4 if n % 3 == 0 else attend(x, keys, values, **options)
            wait()
            keys[:, :, n] = x[:, ::g, 0]
            values[:, :, -50 - n] += x[:, ::g, 0]
            for lens in options.values():
                lens += 1 + torch.arange(b, device="cuda") % 2
            wait()
            x = attend(attend(x, keys, values, **options), keys, values, **options)
            wait()
        return x

    expected = chain(torch.cuda.synchronize)
    for _ in range(5):
        assert torch.equal(chain(lambda: None), expected)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        out = chain(lambda: None)
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shapes", [((3, 4, 8, 1, 50000), (1, 1, 32, 1, 9000)), ((2, 1, 32, 4, 30000), (16, 1, 32, 4, 2048))])
def test_streams_side_by_side(shapes):
    """Blocks of a launch wait for each other; those of two launches, of which the card holds one at a time, do not."""
    calls = [inputs(*shape) for shape in shapes]
    expected = [flashgqa.attention(*call) for call in calls]
    streams, wrong = [torch.cuda.Stream() for _ in calls], torch.zeros(2, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(300):
        for n, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                wrong[n] += (flashgqa.attention(*call) != expected[n]).sum()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


def test_plan_says_why_not():
    q, k, v = inputs(1, 2, 4, 1, 1000)

    def why(q, k, v, **options):
        return dict(flashgqa.explain(q, k, v, **options)["refused"])["fwd_sm90_bf16_d128_dv128_decode"]

    assert "too few" in why(q, k[:, :, :200], v[:, :, :200])
    assert "bias" in why(q, k, v, bias=q.new_zeros(1, 1, 1, 1000))
    assert "up to 8 query rows" in why(*inputs(1, 2, 4, 3, 1000))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    assert "packed" in why(*packed, cu_seqlens_q=int32([0, 1]), cu_seqlens_kv=int32([0, 1000]))
