"""The backward kernels for Hopper (csrc/cuda/sm90/bwd*): which row runs, and what is theirs alone: the order in which key tiles
add to dQ, turns among blocks, lengths against the size of a tile. Everything else is tested with all kernels, in
test_backward.py and its neighbours."""

import itertools

import pytest
import torch
from gpu import assert_alike, equations
from test_hopper import DTYPES, MASKS, inputs, random, row_for

import flashgqa
from flashgqa._bounds import BACKWARD_FACTOR, EPSILON

AVAILABLE = [row["name"] for row in flashgqa.kernels() if row["name"].startswith("bwd_sm90") and row["available"]]
SHORT = [name for name in AVAILABLE if name.endswith("short")]           # test_hopper_backward_short.py: without options
ROWS = [name for name in AVAILABLE if name not in SHORT]
pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
DIMS = [64, 128, 256]


def backward_row(dtype, d, arch=90, variant="plain"):
    return row_for(dtype, d, d, arch, "bwd", variant)


def gradients(q, k, v, arch=90, dout=None, variant="plain", **options):
    """By the Hopper row, from results of whichever forward kernel is the fastest."""
    forward = {key: value for key, value in options.items() if key not in ("deterministic",)}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **forward)
    dout = random(*out.shape, dtype=q.dtype, seed=9) if dout is None else dout
    kernel = backward_row(q.dtype, q.shape[-1], arch, variant)
    return flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=kernel, **options)[:3]


def assert_gradients_alike(got, expected):
    assert_alike(got, expected, ("dq", "dk", "dv"))


def assert_poison_alike(got, expected, clean):
    """Of two sequences the second is poisoned: inf and NaN are where they are in `expected`, the first one is that of `clean`."""
    for a, b, before in zip(got, expected, clean, strict=True):
        poisoned = ~b.isfinite()
        assert torch.equal(poisoned, ~a.isfinite())
        assert torch.equal(a[0], before[0])
        others = ~poisoned.any(-1, keepdim=True)
        assert_gradients_alike([a.where(others, 0)] * 3, [b.where(others, 0)] * 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_head_dim_has_its_row(dtype):
    for d, row in ((8, 64), (64, 64), (72, 128), (128, 128), (136, 256), (256, 256)):
        x = inputs(1, 4, 2, 256, 256, d, dtype=dtype)
        assert flashgqa.explain(*x, backward=True)["kernel"] == f"bwd_sm90_{DTYPES[dtype]}_d{row}_dv{row}_plain"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", DIMS)
def test_scratch_memory(d, causal):
    """At most one and a half times dQ in float32, beside a few words a row, with options, too. Only where the key tiles of a
    pass would leave multiprocessors idle parts of dK and dV come on top, with sums of dQ where walks begin apart: at most 7 tiles
    of 128 keys a multiprocessor, for rows of any length."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    parts = 7 * multiprocessors * 128 * 2 * d * 4
    shapes = [(1, 512), (1, 4096), (16, 1024), (4, 4096), (1, 16384)]
    for (hq, hk), (batch, s) in itertools.product([(16, 16), (32, 8), (64, 8), (32, 1), (4, 4), (2, 1), (1, 1)], shapes):
        q, k = (torch.empty(batch, h, s, d, dtype=torch.bfloat16, device="cuda") for h in (hq, hk))
        rows = batch * hq * s
        every = {"softcap": 30.0, "alibi_slopes": torch.ones(hq, device="cuda"), "dropout_p": 0.1, "seed": 1,
                 "mask": torch.empty(1, 1, s, s, dtype=torch.bool, device="cuda")}
        for options in ({}, *({name: every[name]} for name in ("softcap", "alibi_slopes", "mask")), every):
            scratch = flashgqa.explain(q, k, k, causal=causal, backward=True, **options)["workspace_bytes"]
            few = batch * s < 16384 or batch * hk * s < 128 * multiprocessors
            assert scratch <= 6 * rows * d + 64 * rows + (parts if few else 0), (hq, hk, batch, s, *options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", DIMS)
def test_all_pairs_of_lengths(d, mask):
    """Packed, and padded with NaN; the order that a long causal pass has is taken whatever the number of tasks, too."""
    grid = torch.meshgrid(torch.arange(1, 301, 23), torch.arange(1, 401, 29), indexing="ij")
    queries, keys = (x.reshape(-1).int().cuda() for x in grid)
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys)]
    packed = [x[0].transpose(0, 1) for x in inputs(1, 4, 2, *(int(s[-1]) for s in starts), d)]
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400, **MASKS[mask])
    expected = gradients(*packed, arch=80, **options)
    for extra in ({}, {"batch_invariant": True}, {"deterministic": False}):
        assert_gradients_alike(gradients(*packed, **options, **extra), expected)
    padded = inputs(len(queries), 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    options = dict(q_lens=queries, kv_lens=keys, batch_invariant=True, **MASKS[mask])
    assert_gradients_alike(gradients(*padded, **options), gradients(*padded, arch=80, **options))


@pytest.mark.parametrize("count", [300, 1300])
@pytest.mark.parametrize("d", DIMS)
def test_more_packed_sequences_than_threads_of_a_block(d, count):
    """Some are empty; from 1,025 on they are taken as they come, before that those with most rows first."""
    queries, keys = ((torch.arange(count, device="cuda") * n + n % 7).remainder(41).int() for n in (17, 29))
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys)]
    x = [x[0].transpose(0, 1) for x in inputs(1, 4, 2, *(int(s[-1]) for s in starts), d)]
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=40, max_kv=40, causal=True)
    assert_gradients_alike(gradients(*x, **options), gradients(*x, arch=80, **options))


@pytest.mark.parametrize("group", [1, 2, 8, 32])
@pytest.mark.parametrize("d", DIMS)
def test_long_causal_passes_and_their_groups(d, group):
    """Enough tasks for the folded order, with parts of a group and without."""
    for b, hk, s in ((4, 32 // group, 1000), (1, 32 // group, 2048)):
        x = inputs(b, 32, hk, s, s, d, dtype=torch.bfloat16)
        expected = gradients(*x, arch=80, causal=True)
        for extra in ({}, {"batch_invariant": True}, {"deterministic": False}):
            assert_gradients_alike(gradients(*x, causal=True, **extra), expected)


@pytest.mark.parametrize("d", [64, 128])
def test_long_causal_passes_of_few_tasks_are_split_in_four(d):
    """More key tiles than a chain has: the parts of a large group; in whole, and in any order."""
    x = inputs(1, 16, 1, 8330, 8330, d, dtype=torch.bfloat16)
    assert flashgqa.explain(*x, backward=True, causal=True)["splits"] == 4
    expected = gradients(*x, arch=80, causal=True)
    got = gradients(*x, causal=True)
    assert_gradients_alike(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(*x, causal=True), got, strict=True))
    assert_gradients_alike(gradients(*x, causal=True, deterministic=False), expected)


@pytest.mark.parametrize("d", DIMS)
def test_any_order_is_taken_where_few_tasks_would_wait_for_each_other(d):
    """And what the plan says is what runs: the same bits where it says in order."""
    for b, hq, hk, s, options, any_order in (
        (1, 4, 4, 4096, {}, d < 256), (1, 2, 2, 2048, {}, d < 256), (1, 4, 4, 4096, {"causal": True}, d < 256),
        (16, 16, 16, 1024, {}, False), (1, 4, 4, 2048, {"window": (500, 0)}, False),
    ):  # fmt: skip
        x = inputs(b, hq, hk, s, s, d, dtype=torch.bfloat16)
        plan = flashgqa.explain(*x, backward=True, deterministic=False, **options)
        assert plan["any_order"] is any_order and f"summed in {'any ' if any_order else ''}order" in str(plan)
        assert not flashgqa.explain(*x, backward=True, **options)["any_order"]
        ordered, free = gradients(*x, **options), gradients(*x, deterministic=False, **options)
        if any_order:
            assert_gradients_alike(free, ordered)
        else:
            assert all(torch.equal(a, b) for a, b in zip(free, ordered, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_walks_of_few_tasks_begin_apart(d, causal, dtype):
    """All key tiles or the first ones, a step or two apart; parts; other lengths of queries and keys. What they end with has sums
    of its own, which `deterministic=False` does without."""
    shapes = (1, 4, 4, 4096, 4096), (1, 8, 2, 2048, 3000), (1, 1, 1, 5000, 8192), (2, 3, 1, 4100, 2000), (1, 4, 2, 8192, 8192)
    for b, hq, hk, sq, sk in shapes:
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        options = dict(causal=causal)
        scratch = [flashgqa.explain(*x, backward=True, deterministic=n, **options)["workspace_bytes"] for n in (True, False)]
        assert scratch[0] > scratch[1]
        expected, got = gradients(*x, arch=80, **options), gradients(*x, **options)
        assert_gradients_alike(got, expected)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(gradients(*x, **options), got, strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 20.0}, {"dropout_p": 0.1, "seed": 3}], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_poison_under_walks_that_begin_apart(d, options):
    """inf and NaN in rows of dO that the first and the last steps of walks come to; other kernels than the plain ones."""
    x = inputs(2, 4, 2, 3000, 4000, d, dtype=torch.bfloat16)
    dout = random(2, 4, 3000, d, dtype=torch.bfloat16, seed=9)
    clean = gradients(*x, dout=dout, **options)
    reference = dict(options, arch=80, variant="general")
    assert_gradients_alike(clean, gradients(*x, dout=dout, **reference))
    for row in (2, 1500, 2990):
        dout[1, 1, row, row % d] = (float("nan"), float("inf"))[row % 4 // 2]
    got, expected = gradients(*x, dout=dout, **options), gradients(*x, dout=dout, **reference)
    if "dropout_p" not in options:
        assert_poison_alike(got, expected, clean)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("d", DIMS)
def test_windows_are_walked_head_by_head(d, group):
    """Windows of several query tiles, whose key tiles' blocks meet at one head's tiles after the other's; split groups."""
    for b, hk, s in ((2, 8, 1500), (1, 2, 700)):
        x = inputs(b, hk * group, hk, s, s, d, dtype=torch.bfloat16)
        for window in ((500, 0), (130, 260)):
            expected = gradients(*x, arch=80, window=window)
            got = gradients(*x, window=window)
            assert_gradients_alike(got, expected)
            assert all(torch.equal(a, b) for a, b in zip(gradients(*x, window=window), got, strict=True))
            assert_gradients_alike(gradients(*x, window=window, deterministic=False), expected)


@pytest.mark.parametrize("d", DIMS)
def test_one_sequence_has_the_same_bits_in_any_batch(d):
    x = inputs(5, 8, 2, 700, 700, d, dtype=torch.bfloat16)
    dout = random(5, 8, 700, d, dtype=torch.bfloat16, seed=9)
    together = gradients(*x, dout=dout, causal=True, batch_invariant=True)
    alone = gradients(*(y[3:4] for y in x), dout=dout[3:4], causal=True, batch_invariant=True)
    assert all(torch.equal(a[3:4], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", DIMS)
def test_same_bits_in_200_runs_beside_a_busy_stream(d, causal):
    q, k, v = inputs(60, 8, 2, 512, 512, d, dtype=torch.bfloat16)
    out, lse = flashgqa.attention(q, k, v, causal=causal, return_lse=True)
    dout = random(*out.shape, dtype=q.dtype, seed=9)
    expected = flashgqa.attention_backward(dout, q, k, v, out, lse, causal=causal)[:3]
    side, busy, same = torch.cuda.Stream(), random(2048, 2048, dtype=q.dtype), torch.ones((), dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(side):
            torch.mm(busy, busy)
        got = flashgqa.attention_backward(dout, q, k, v, out, lse, causal=causal)[:3]
        for a, b in zip(got, expected, strict=True):
            same &= (a.view(torch.int16) == b.view(torch.int16)).all()
    assert same.item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", DIMS)
def test_logits_far_below_zero_at_every_length_modulo_a_tile(d, causal):
    """All logits are shifted by -120: keys that do not exist must not count as 0. One column of K is the same large number in
    all keys, so that roundings of dS, whose rows sum to 0, are most of dQ there: by the error rule of flashgqa/_bounds.py."""
    lengths = torch.arange(1, 129).int().cuda() + 128
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (x[0].transpose(0, 1) for x in inputs(1, 2, 1, int(starts[-1]), int(starts[-1]), d))
    q[..., 0], k[..., 0] = 16.0, -120.0 / 16.0 * d**0.5
    dout = random(*q.shape, dtype=q.dtype, seed=9)
    options = dict(cu_seqlens_q=starts, cu_seqlens_kv=starts, max_q=256, max_kv=256, causal=causal)
    got = gradients(q, k, v, dout=dout, **options)
    errors = torch.zeros(3, 3, dtype=torch.float64, device="cuda")  # errors, naive errors, largest values
    for begin, end in itertools.pairwise(starts.tolist()):
        part = *(x[begin:end].transpose(0, 1) for x in (dout, q)), *(x[begin:end, 0] for x in (k, v))
        exact, narrow = (equations(*part, causal, narrow)[1:] for narrow in (False, True))
        for n, (x, want, naive) in enumerate(zip(got, exact, narrow, strict=True)):
            mine = (x[begin:end].transpose(0, 1).double() - want).abs().max()
            errors[n] = torch.maximum(errors[n], torch.stack([mine, (naive - want).abs().max(), want.abs().max()]))
    ours, naive, largest = errors.unbind(-1)
    assert (ours <= BACKWARD_FACTOR * naive + 2 * EPSILON["float16"] * largest).all(), errors
