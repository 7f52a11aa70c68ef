"""Relations that hold whatever the numbers, and random calls against the oracle."""

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import FLOATS, Case, build
from checking import DTYPES, fields_without_variety, same_bits
from conftest import backends
from hypothesis import given, note, settings
from test_backward import check_backward
from test_forward import check_forward

import flashgqa
from flashgqa import reference

B, HQ, HK, SQ, SK, D, DV = 2, 6, 2, 37, 150, 24, 40


@pytest.fixture
def tensors(rng):
    """q, k, v, dout in float64, so that two ways to one number agree to 1e-13."""
    shapes = (B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, DV), (B, HQ, SQ, DV)
    return [rng.standard_normal(shape) for shape in shapes]


def run(backend, q, k, v, dout, dlse=None, **options):
    """out, lse, dq, dk, dv, dbias, dsink."""
    out, lse = backend.attention(q, k, v, **options, return_lse=True)
    return out, lse, *backend.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)


def assert_same(a, b, atol=1e-13):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), a, b, strict=False):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


# ---- one meaning, two ways to say it ----


@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize(
    "rule", [{"causal": True}, {"window": (20, 3)}, {"window": (0, None)}, {"chunk": 16}, {"causal": True, "chunk": 50}], ids=str
)
def test_a_rule_is_the_mask_it_describes(rule, align, tensors, backend):
    mask = reference.visible(SQ, SK, align=align, **rule)
    by_rule = run(backend, *tensors, **rule, align=align)
    assert_same(by_rule, run(backend, *tensors, mask=mask))
    assert_same(by_rule, run(backend, *tensors, bias=np.where(mask, 0.0, -np.inf)))


def test_grouped_heads_are_repeated_keys_and_values(tensors, backend):
    q, k, v, dout = tensors
    out, lse, dq, dk, dv, *_ = run(backend, q, k, v, dout, causal=True)
    g = HQ // HK
    wide = run(backend, q, np.repeat(k, g, axis=1), np.repeat(v, g, axis=1), dout, causal=True)
    summed = [x.reshape(B, HK, g, SK, -1).sum(axis=2) for x in wide[3:5]]
    assert_same((out, lse, dq, dk, dv), (*wide[:3], *summed))


@pytest.mark.parametrize("window", [(SK, SK), (SK, None), (None, SK), (None, None), (2**40, 2**31)])
def test_a_window_as_long_as_the_sequence_changes_no_bit(window, tensors, backend):
    for a, b in zip(run(backend, *tensors, window=window), run(backend, *tensors), strict=True):
        assert same_bits(a, b)


def test_a_constant_added_to_all_scores_moves_the_lse_only(tensors, backend):
    plain = run(backend, *tensors)
    moved = run(backend, *tensors, bias=np.full((1, 1, 1, 1), 3.25))
    assert_same((plain[0], plain[1] + 3.25, *plain[2:5]), moved)


def test_scale_is_a_factor_of_q(tensors, backend):
    q, k, v, dout = tensors
    a = run(backend, q, k, v, dout, scale=0.5)
    b = run(backend, q * 0.5, k, v, dout, scale=1.0)
    assert_same(a, (*b[:2], b[2] * 0.5, *b[3:5]))


def test_a_very_large_softcap_is_none(tensors, backend):
    assert_same(run(backend, *tensors, softcap=1e9), run(backend, *tensors), atol=1e-8)


def test_a_sink_of_minus_infinity_is_none(tensors, backend):
    with_sink = run(backend, *tensors, sink=np.full(HQ, -np.inf))
    assert_same(with_sink, run(backend, *tensors))
    assert (with_sink[6] == 0).all()


def test_a_sink_is_a_key_with_zero_value(tensors, backend):
    q, k, v, dout = tensors
    sink = np.linspace(-2, 3, HQ)
    bias = np.zeros((1, HQ, 1, SK + 1))
    bias[0, :, 0, SK] = sink
    longer = [np.concatenate([x, np.zeros((B, HK, 1, x.shape[3]))], axis=2) for x in (k, v)]
    by_key = run(backend, q, *longer, dout, bias=bias)
    by_sink = run(backend, *tensors, sink=sink)
    assert_same(by_sink, (*by_key[:3], by_key[3][:, :, :SK], by_key[4][:, :, :SK]))
    np.testing.assert_allclose(by_sink[6], by_key[5][0, :, 0, SK], atol=1e-12)


def test_alibi_is_a_bias_of_distances(tensors, backend):
    slopes = np.float32([0.5, 0.25, 0.125, 1, 2, 0.03125])
    distance = np.abs(np.arange(SQ)[:, None] + SK - SQ - np.arange(SK))
    by_bias = run(backend, *tensors, bias=-slopes.astype(float)[None, :, None, None] * distance, causal=True)
    assert_same(run(backend, *tensors, alibi_slopes=slopes, causal=True), by_bias)


# ---- moving things about ----


def test_permuted_batch_and_heads_permute_the_results(tensors, backend):
    q, k, v, dout = tensors
    plain = run(backend, *tensors, causal=True)
    flipped = run(backend, *(x[::-1] for x in tensors), causal=True)
    assert all(same_bits(np.ascontiguousarray(a[::-1]), b) for a, b in zip(plain[:5], flipped[:5], strict=True))
    order = [3, 4, 5, 0, 1, 2]
    moved = run(backend, q[:, order], k[:, ::-1], v[:, ::-1], dout[:, order], causal=True)
    expected = [plain[0][:, order], plain[1][:, order], plain[2][:, order], plain[3][:, ::-1], plain[4][:, ::-1]]
    assert all(same_bits(np.ascontiguousarray(a), b) for a, b in zip(expected, moved[:5], strict=True))


def test_permuted_keys_change_nothing_but_the_order_of_their_gradients(rng, tensors, backend):
    q, k, v, dout = tensors
    order = rng.permutation(SK)
    plain = run(backend, *tensors)
    moved = run(backend, q, k[:, :, order], v[:, :, order], dout)
    assert_same((*plain[:3], plain[3][:, :, order], plain[4][:, :, order]), moved)


def test_layouts_and_ranks_give_the_same_bits(tensors, backend):
    plain = run(backend, *tensors, causal=True)
    bshd = run(backend, *(np.ascontiguousarray(x.swapaxes(1, 2)) for x in tensors), causal=True, layout="bshd")
    one = run(backend, *(x[0] for x in tensors), causal=True)
    one_bshd = run(backend, *(x[0].swapaxes(0, 1) for x in tensors), causal=True, layout="bshd")
    alone = run(backend, *(x[:1] for x in tensors), causal=True)
    for n in range(5):
        back = (lambda x: x) if n == 1 else (lambda x: x.swapaxes(-3, -2))
        assert same_bits(plain[n], np.ascontiguousarray(back(bshd[n])))
        assert same_bits(alone[n][0], one[n])
        assert same_bits(alone[n][0], np.ascontiguousarray(back(one_bshd[n])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_twice_as_large_give_results_twice_as_large_to_the_bit(dtype, tensors, backend):
    q, k, v, dout = (x.astype(DTYPES[dtype]) for x in tensors)
    v = np.abs(v) + DTYPES[dtype].type(0.5)  # keeps results out of the subnormal range, where doubling is not exact
    two = DTYPES[dtype].type(2)
    plain, doubled = run(backend, q, k, v, dout), run(backend, q, k, v * two, dout)
    assert same_bits(plain[0] * two, doubled[0]) and same_bits(plain[1], doubled[1]) and same_bits(plain[4], doubled[4])


def test_lengths_are_slices(tensors, backend):
    q, k, v, dout = tensors
    q_lens, kv_lens = np.int32([20, 37]), np.int32([150, 77])
    padded = run(backend, *tensors, q_lens=q_lens, kv_lens=kv_lens, causal=True)
    for n in range(B):
        rows, keys = slice(0, q_lens[n]), slice(0, kv_lens[n])
        alone = run(backend, q[n, :, rows], k[n, :, keys], v[n, :, keys], dout[n, :, rows], causal=True)
        picked = (padded[0][n][:, rows], padded[1][n][:, rows], padded[2][n][:, rows])
        assert_same((*picked, padded[3][n][:, keys], padded[4][n][:, keys]), alone)


def test_packed_is_each_sequence_by_itself(backend):
    case = Case(packed=((5, 9), (0, 3), (70, 33), (64, 200)), hq=HQ, hk=HK, d=D, dtype="float64", alibi="h", window=(50, 2))
    call = build(case)
    q, k, v = call.inputs
    packed = run(backend, q, k, v, call.dout, dlse=call.dlse, **call.options)
    cu_q, cu_k = call.options.pop("cu_seqlens_q"), call.options.pop("cu_seqlens_kv")
    for n in range(len(case.packed)):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = (q[rows], k[keys], v[keys], call.dout[rows])
        alone = run(backend, *own, dlse=call.dlse[:, rows], layout="bshd", **call.options)
        picked = (packed[0][rows], packed[1][:, rows], packed[2][rows], packed[3][keys], packed[4][keys])
        assert_same(picked, alone)


# ---- splits of the keys ----


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("cuts", [(75,), (0, 1, 40, 40, 149, 150)])
def test_merged_parts_are_the_whole(layout, cuts, tensors, backend):
    q, k, v, _ = (x if layout == "bhsd" else x.swapaxes(1, 2) for x in tensors)
    axis = 2 if layout == "bhsd" else 1
    parts = [
        backend.attention(q, k_part, v_part, layout=layout, return_lse=True)
        for k_part, v_part in zip(np.split(k, cuts, axis), np.split(v, cuts, axis), strict=True)
    ]
    out, lse = flashgqa.merge(*zip(*parts, strict=True), layout=layout)
    assert_same((out, lse), backend.attention(q, k, v, layout=layout, return_lse=True))
    assert_same((out, lse), reference.merge(*zip(*parts, strict=True), layout=layout))


def test_merge_of_empty_parts_and_of_a_part_that_holds_the_sink(tensors, backend):
    q, k, v, _ = tensors
    sink = np.linspace(-1, 1, HQ)
    half = [slice(0, 60), slice(60, SK)]
    with_sink = backend.attention(q, k[:, :, half[0]], v[:, :, half[0]], sink=sink, return_lse=True)
    without = backend.attention(q, k[:, :, half[1]], v[:, :, half[1]], return_lse=True)
    nothing = backend.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    out, lse = flashgqa.merge(*zip(nothing, with_sink, nothing, without, strict=True))
    assert_same((out, lse), backend.attention(q, k, v, sink=sink, return_lse=True))
    out, lse = flashgqa.merge(*zip(nothing, nothing, strict=True))
    assert (out == 0).all() and (lse == -np.inf).all()


# ---- random calls ----


@st.composite
def storages(draw):
    """Any order of the axes in memory, gaps and directions; the last axis too, which is then copied."""
    order = tuple(draw(st.permutations(range(4)))) if draw(st.booleans()) else (0, 1, 2, 3)
    return order, tuple(draw(st.integers(0, 3)) for _ in range(4)), tuple(draw(st.booleans()) for _ in range(4))


@st.composite
def random_cases(draw):
    def maybe(strategy, otherwise=None):
        return draw(st.one_of(st.just(otherwise), strategy))

    small = st.one_of(st.integers(0, 9), st.integers(10, 70), st.sampled_from([127, 128, 129, 140]))
    kind = draw(st.sampled_from(["padded", "packed", "plain", "plain"]))
    packed = tuple(draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=4))) if kind == "packed" else None
    rank = draw(st.sampled_from([3, 4])) if packed is None else 4
    b = 1 if rank == 3 else draw(st.integers(0, 3))
    hk = draw(st.integers(1, 3))
    hq = hk * draw(st.sampled_from([1, 1, 2, 3, 5, 8]))
    sq, sk = (33, 33) if packed is not None else (draw(small), draw(small))
    axes = "bhqk" if rank == 4 else "hqk"
    each_axis = st.tuples(*(st.sampled_from((letter, "1")) for letter in axes))
    score_axes = st.one_of(st.just("qk"), st.builds("".join, each_axis))
    bound = st.one_of(st.none(), st.integers(0, 60))
    lens = {
        name: maybe(st.tuples(*(st.integers(0, n) for _ in range(b)))) if kind == "padded" else None
        for name, n in (("q_lens", sq), ("kv_lens", sk))
    }
    d = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 65, 100])))
    return Case(
        b=b,
        hq=hq,
        hk=hk,
        sq=sq,
        sk=sk,
        d=d,
        dv=maybe(st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 64, 72]))),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])),
        layout=maybe(st.sampled_from(["bhsd", "bshd"])) if packed is None else None,
        rank=rank,
        causal=draw(st.booleans()),
        window=maybe(st.tuples(bound, bound)),
        align=maybe(st.sampled_from(["bottom-right", "top-left"])),
        chunk=maybe(st.integers(1, 80)) if draw(st.booleans()) else None,
        scale=maybe(st.sampled_from([0.1, 1.0, -0.3])),
        softcap=maybe(st.sampled_from([0.5, 5.0, 30.0])),
        mask=maybe(score_axes, ""),
        bias=maybe(score_axes, ""),
        bias_dtype=maybe(st.sampled_from(FLOATS)),
        score_storage=draw(st.one_of(st.sampled_from(["contiguous", "zero"]), storages())),
        alibi=draw(st.sampled_from(["", "", "h", "bh"])),
        sink=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        seed_offset=maybe(st.integers(0, 2**32 - 1)),
        packed=packed,
        bounds=draw(st.booleans()) if packed is not None else False,
        storage=draw(st.one_of(st.just("contiguous"), storages())),
        data=draw(st.sampled_from(["normal", "normal", "large", "shift", "equal"])),
        dlse=draw(st.booleans()),
        **lens,
    )


@given(case=random_cases())
@settings(max_examples=200)
def test_random_calls_within_the_error_rule(case):
    for backend in backends():
        note(repr(backend))
        check_forward(case, backend)
        check_backward(case, backend)


def test_random_calls_reach_every_field():
    """Guards the strategy itself: over its examples each field of a Case takes more than one value."""
    assert fields_without_variety(random_cases(), Case, 100) == []
