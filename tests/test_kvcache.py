"""attention_with_kvcache against the oracle, against attention over all tokens at once, and bit by bit against itself."""

import ast
import doctest
import inspect
import pathlib

import numpy as np
import pytest
from checking import (
    DTYPES,
    EPSILON_OF,
    Guarded,
    assert_within,
    fields_without_variety,
    memory_of,
    naive_forward,
    place,
    same_bits,
)
from conftest import cache_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcases import CASES, FLOAT8, FLOAT8_CASES, CacheCase, angles, build, expected
from test_forward import FAR, sparse

import flashgqa
from flashgqa import kvcache, reference

BACKENDS = cache_backends()
HOPPER = any(row["available"] and "_sm90_" in row["name"] for row in flashgqa.kernels())
# The best row of the CPU, and those of a GPU.
BEST = BACKENDS[:1] + [backend for backend in BACKENDS if backend.device == "cuda"]


def check(case, backend):
    tensors, options = build(case)
    swap = (lambda x: x.swapaxes(1, 2)) if case.layout == "bshd" else (lambda x: x)
    dtype, q = DTYPES[case.dtype], tensors[0]
    others = [x for x in (q, *tensors[3:], *options.values(), *options.get("rotary", ())) if isinstance(x, np.ndarray)]
    before = [memory_of(x).tobytes() for x in others]
    shape = (*q.shape[:-1], tensors[2].shape[-1])
    guarded = Guarded(shape, dtype, case.storage if case.storage in ("sliced", "negative") else "contiguous")
    # The oracle appends to copies that keep the storage, so that memory around and between slots is compared as well.
    copies = list(tensors)
    for n in (1, 2):
        memory = memory_of(tensors[n]).copy()
        offset = tensors[n].__array_interface__["data"][0] - memory_of(tensors[n]).__array_interface__["data"][0]
        copies[n] = np.ndarray(tensors[n].shape, tensors[n].dtype, memory, offset, tensors[n].strides)
    answers = list(expected(case, copies, options))
    out, lse = backend.attention_with_kvcache(*tensors, **options, return_lse=True, out=guarded.array)
    assert out is guarded.array
    guarded.check()
    assert [memory_of(x).tobytes() for x in others] == before, "an input other than the cache was written"
    assert same_bits(memory_of(tensors[2]), memory_of(copies[2])), "v_cache is not what the oracle made of it"
    if not case.pairs:
        assert same_bits(memory_of(tensors[1]), memory_of(copies[1])), "k_cache is not what the oracle made of it"
    kept, wanted = (memory_of(x).astype(np.float64) for x in (tensors[1], copies[1]))
    np.testing.assert_allclose(kept, wanted, rtol=0.126 if case.float8 else EPSILON_OF[case.dtype], atol=1e-12)
    rows = case.q_lens or [case.sq] * case.b
    for n, (out_n, lse_n, naive) in enumerate(answers):
        got_out, got_lse = swap(out)[n, :, : rows[n]], lse[n, :, : rows[n]]
        assert_within("out", got_out, out_n, (x for x, _ in naive), dtype, 2)
        assert_within("lse", got_lse, lse_n, (x for _, x in naive), lse.dtype, 2)
        assert not swap(out)[n, :, rows[n] :].any() and (lse[n, :, rows[n] :] == -np.inf).all()


@pytest.mark.parametrize("on", BACKENDS, ids=repr)
@pytest.mark.parametrize("case", CASES + FLOAT8_CASES, ids=str)
def test_within_the_error_rule(case, on):
    check(case, on)


@st.composite
def cache_cases(draw):
    b, new, slots = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(10, 300))
    lens = tuple(draw(st.integers(0, slots - new)) for _ in range(b))
    d, sq, float8 = draw(st.integers(2, 40)), draw(st.integers(0, 10)), draw(st.booleans())
    new_lens = draw(st.none() | st.tuples(*[st.integers(0, new)] * b))
    no_row_before_0 = all(length + added >= sq for length, added in zip(lens, new_lens or [new] * b, strict=True))
    pairs = draw(st.sampled_from((0, 1, d // 2))) if no_row_before_0 else 0
    pages = draw(st.sampled_from((None, None, 1, 3, 16, 50, 128)))
    return CacheCase(
        b=b, lens=lens, slots=slots, new=new, d=d, pages=pages, sq=sq, float8=float8, pairs=pairs,
        new_lens=new_lens,
        scales=draw(st.sampled_from(("", "h", "bh"))) if float8 else "",
        interleaved=pairs > 0 and draw(st.booleans()),
        offsets=draw(st.none() | st.tuples(*[st.integers(sq, slots)] * b)) if pairs else None,
        q_lens=draw(st.none() | st.tuples(*[st.integers(0, sq)] * b)),
        chunk=draw(st.none() | st.integers(1, 100)),
        scale=draw(st.sampled_from((None, None, 0.3, -1.0))),
        hk=draw(st.integers(1, 3)),
        g=draw(st.integers(1, 9)),
        dv=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        indexed=pages is None and draw(st.booleans()),
        left_pad=draw(st.none() | st.just(tuple(n * draw(st.integers(0, 4)) // 4 for n in lens))),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(st.none() | st.integers(0, 60), st.none() | st.integers(0, 9))),
        softcap=draw(st.none() | st.just(1.5)),
        alibi=draw(st.sampled_from(("", "h", "bh"))),
        sink=draw(st.booleans()),
        layout=draw(st.sampled_from((None, "bshd"))),
        storage=draw(st.sampled_from(("contiguous", "sliced", "negative", "gaps"))),
    )  # fmt: skip


@pytest.mark.parametrize("on", BEST, ids=repr)
@given(case=cache_cases())
@settings(max_examples=60)
def test_random_calls_within_the_error_rule(case, on):
    check(case, on)


def test_random_calls_reach_every_field():
    assert fields_without_variety(cache_cases(), CacheCase, 120) == []


# ---- token by token ----

STEPS, UNIT = 11, 0.5       # the scale of a float8 cache: its elements times that are numbers of every dtype
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16, 71)
KINDS = ("contiguous", "indexed", "float8", 1, 3, 16)
OPTIONS = {
    "plain": {},
    "window": {"window": (4, None)},
    "chunk": {"chunk": 4},
    "softcap": {"softcap": 1.0},
    "scale": {"scale": 0.3},
    "sink": {"sink": True},
    "alibi": {"alibi_slopes": True},
    "halves": {"rotary": 8},
    "neighbours": {"rotary": 4, "rotary_interleaved": True},
    "left_pad": {"left_pad": 3},
}


def decode(backend, kind, q, k, v, lens_at_start, known, **options):
    """out [b, hq, n, dv] of all tokens but those `known`, which come together, each its own call, on a cache of this kind; what
    a float8 one then holds; the kernel of the last call."""
    b, hk, s, d = k.shape
    slots = lens_at_start + s
    if isinstance(kind, int):
        columns = -(-slots // kind)
        options["page_table"] = np.random.default_rng(0).permutation(b * columns).astype(np.int32).reshape(b, columns)
        shape = (b * columns, hk, kind)
    else:
        shape = (b + 1, hk, slots) if kind == "indexed" else (b, hk, slots)
        if kind == "indexed":
            options["batch_index"] = np.arange(b, 0, -1, dtype=np.int32)
    dtype, stored = k.dtype, FLOAT8 if kind == "float8" else k.dtype
    if kind == "float8":
        options |= {name: np.full(hk, UNIT, np.float32) for name in ("k_scale", "v_scale")}
    # What streams a cache wants rows on 16 bytes, which `place` takes from them.
    caches = [np.full((*shape, x.shape[-1]), np.nan, stored) for x in (k, v)]
    caches = [backend.put(x if known else place(x)) for x in caches]
    options = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    if "rotary" in options:
        options["rotary"] = [backend.put(x) for x in options["rotary"]]
    kernel = backend.kernel("fwd", q.dtype, d, v.shape[-1]) if backend.device == "cuda" else None
    q, k, v = map(backend.put, (q, k, v))
    out = []
    for part in (slice(0, known), *(slice(i, i + 1) for i in range(known, s))):
        tokens = [x[:, :, part] for x in (q, k, v)]
        call = tokens[0], *caches, *tokens[1:]
        options |= {"cache_lens": lens_at_start + part.start, "causal": True, "kernel": kernel}
        out.append(backend.get(flashgqa.attention_with_kvcache(*call, **options)))
    held = [backend.get(x)[:, :, lens_at_start:].astype(dtype) * dtype.type(UNIT) for x in caches]
    ran = flashgqa.explain_with_kvcache(*call, **options)["kernel"]
    return np.concatenate(out[1:], axis=2), held if kind == "float8" else None, ran


@pytest.mark.parametrize("on", BEST, ids=repr)
@pytest.mark.parametrize("known", [0, 300])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("g", GROUPS)
def test_token_by_token_equals_the_whole_causal_forward(g, name, known, on, rng):
    """From the first token on, and behind a prompt, whose keys are enough for the kernels that stream a cache."""
    names = [name for name in sorted(DTYPES) if on.device == "cpu" or name != "float64"]
    for n, kind in enumerate(KINDS):
        dtype, d = DTYPES[names[(n + g) % len(names)]], 72 if known and (n + g) % 2 else 16
        options = dict(OPTIONS[name])
        q, k, v = (rng.standard_normal((2, h, known + STEPS, d)).astype(dtype) for h in (g, 1, 1))
        if "sink" in options:
            options["sink"] = rng.standard_normal(g).astype(dtype)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = rng.random(g).astype(np.float32)
        pad = options.pop("left_pad", 0)
        whole = {key: x for key, x in options.items() if not key.startswith("rotary")}
        if pad:
            options["left_pad"] = np.full(2, pad, np.int32)
        q_turned, k_turned = q.astype(np.float64), k
        if "rotary" in options:
            options["rotary"] = angles(known + STEPS, options["rotary"])
            turn = (*options["rotary"], np.arange(known + STEPS), options.get("rotary_interleaved", False))
            q_turned, k_turned = reference.rotate(q, *turn), reference.rotate(k, *turn).astype(dtype)
        out, held, ran = decode(on, kind, q, k, v, pad, known, **options)
        streamed = known and dtype.itemsize == 2 and kind in ("contiguous", "indexed", 16) and name != "chunk"
        assert not (streamed and HOPPER and repr(on) == "cuda") or "_decode" in ran
        keys, values = held or (k_turned, v)
        for x, exact in ((keys, k_turned), (values, v)):
            np.testing.assert_allclose(x.astype(np.float64), exact.astype(np.float64), rtol=0.07, atol=2e-3)
        q_turned = q_turned[:, :, known:]
        right = reference.attention(q_turned, keys, values, causal=True, **whole)
        naive = naive_forward(q_turned.astype(dtype), keys, values, causal=True, **whole)
        assert_within(f"out of {kind}", out, right, (x for x, _ in naive), dtype, 2)


@pytest.mark.parametrize("on", BEST, ids=repr)
def test_chunked_prefill_equals_the_whole_causal_forward(on, rng):
    dtype, s = np.float32, 150
    q, k, v = (rng.standard_normal((2, h, s, 32)).astype(dtype) for h in (6, 2, 2))
    for page_size, chunks in ((None, (64, 64, 22)), (16, (1, 16, 16, 100, 17)), (48, (150,))):
        slots = page_size or s
        columns = -(-s // slots)
        caches = [np.zeros((2 * columns, 2, slots, 32), dtype) for _ in range(2)]
        table = np.arange(2 * columns, dtype=np.int32).reshape(columns, 2).T if page_size else None
        out, start = np.empty_like(q), 0
        for n in chunks:
            rows = slice(start, start + n)
            out[:, :, rows] = on.attention_with_kvcache(
                q[:, :, rows], *caches, k[:, :, rows], v[:, :, rows], cache_lens=start, page_table=table, causal=True
            )
            start += n
        right = reference.attention(q, k, v, causal=True)
        assert_within("out", out, right, (x for x, _ in naive_forward(q, k, v, causal=True)), np.dtype(dtype), 2)


# ---- bits ----


@pytest.mark.parametrize("case", [
    CacheCase(lens=(5, 300, 2000), slots=2050, d=64),
    CacheCase(lens=(5, 300, 2000), slots=2050, d=64, g=16, dtype="bfloat16"),
    CacheCase(lens=(5, 300, 2000), slots=2050, d=33, dv=33, g=12, sq=2, new=2),
    CacheCase(lens=(5, 300, 2000), slots=2050, d=24, sq=5, new=5, pairs=8, dtype="float64"),
    CacheCase(lens=(5, 300, 2000), slots=2050, d=64, float8=True, scales="h"),
], ids=str)  # fmt: skip
def test_bits_depend_on_the_sequence_alone(case):
    """Not on the other sequences, the kind of cache, the size of pages or the number of threads."""
    (q, k_cache, v_cache, k_new, v_new), options = build(case)
    threads = flashgqa.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            flashgqa.set_num_threads(n)
            call = q, k_cache.copy(), v_cache.copy(), k_new, v_new
            results.append(flashgqa.attention_with_kvcache(*call, **options, return_lse=True))
    finally:
        flashgqa.set_num_threads(threads)
    out, lse = results[0]
    assert all(same_bits(a, out) and same_bits(b, lse) for a, b in results[1:])
    for n in range(case.b):
        own = {name: x[n : n + 1] if name == "cache_lens" else x for name, x in options.items()}
        call = [x[n : n + 1].copy() for x in (q, k_cache, v_cache, k_new, v_new)]
        assert same_bits(flashgqa.attention_with_kvcache(*call, **own), out[n : n + 1])
    for page_size in (1, 16, 40, 128, 1000):
        columns = -(-case.slots // page_size)
        padded = [np.zeros((case.b, case.hk, columns * page_size, case.d), x.dtype) for x in (k_cache, v_cache)]
        for to, x in zip(padded, (k_cache, v_cache), strict=True):
            to[:, :, : case.slots] = x
        pages = [
            x.reshape(case.b, case.hk, columns, page_size, case.d).swapaxes(1, 2).reshape(-1, case.hk, page_size, case.d).copy()
            for x in padded
        ]
        table = np.arange(case.b * columns, dtype=np.int32).reshape(case.b, columns)
        assert same_bits(flashgqa.attention_with_kvcache(q, *pages, k_new, v_new, page_table=table, **options), out)


@pytest.mark.parametrize("axis", ["page", "head", "slot"])
def test_slots_more_than_2_31_elements_apart(axis, rng):
    """float16: 4 GiB of address space, a few pages of memory."""
    shape = (4, 2, 3, 16)
    strides = {"page": (FAR, 4096, 64, 1), "head": (4096, FAR, 64, 1), "slot": (8192, 1024, FAR, 1)}[axis]
    near = [rng.standard_normal(shape).astype(np.float16) for _ in range(2)]
    far = [sparse(shape, strides, np.float16) for _ in range(2)]
    for to, x in zip(far, near, strict=True):
        to[...] = x
    q, new = (rng.standard_normal((1, h, 2, 16)).astype(np.float16) for h in (6, 2))
    options = {"cache_lens": 8, "page_table": np.array([[3, 0, 2, 1]], np.int32), "causal": True}
    out = [flashgqa.attention_with_kvcache(q, *caches, new, new, **options) for caches in (near, far)]
    assert same_bits(*out) and all(same_bits(a, b.copy()) for a, b in zip(near, far, strict=True))


def test_float8_rounds_to_nearest_and_saturates(rng):
    import ml_dtypes

    float8 = np.dtype(ml_dtypes.float8_e4m3fn)
    every = np.arange(256, dtype=np.uint8).view(float8).astype(np.float32)
    numbers = np.unique(every[np.isfinite(every)])
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([every, numbers, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf),
                        rng.standard_normal(300), [449, 463, 464, 465, 1e9, np.inf, -449, -464.5, -np.inf, 1e-9, -1e-9, -0.0]])
    x = x.astype(np.float32)[:, None]
    cache = np.zeros((1, 1, len(x), 1), float8)
    new = x.reshape(cache.shape)
    q = np.ones((1, 1, 1, 1), np.float32)
    flashgqa.attention_with_kvcache(q[:, :, :0], cache, cache.copy(), new, new, cache_lens=0)
    wanted = np.clip(new, -448, 448).astype(float8)
    assert same_bits(np.nan_to_num(cache.astype(np.float32), nan=1e9), np.nan_to_num(wanted.astype(np.float32), nan=1e9))
    # And back: attention to one key returns its value.
    for n in range(256):
        value = np.array([n], np.uint8).view(float8).reshape(1, 1, 1, 1)
        out = flashgqa.attention_with_kvcache(q, np.zeros_like(value), value)
        assert out.item() == value.astype(np.float32).item() or (np.isnan(out).all() and n % 128 == 127)


@pytest.mark.parametrize("by", [flashgqa, flashgqa.reference], ids=["cpu", "oracle"])
def test_new_keys_are_rounded_once(by):
    """By way of float32 each of these would become a tie, and that be rounded to the even side."""
    import ml_dtypes

    def appended(x, dtype, **options):
        new = np.array(x, options.pop("of"))[None, None, None]
        caches = [np.zeros((1, 1, 1, new.shape[-1]), dtype) for _ in range(2)]
        q = np.ones((1, 1, 1, new.shape[-1]), np.float32 if new.dtype == np.float32 else dtype)
        by.attention_with_kvcache(q, *caches, new, new, cache_lens=np.array([0], np.int32), **options)
        return caches[0].astype(np.float64).ravel()

    scale = np.array([2.6895964], np.float32)
    x = np.array([-0.3256933, 0.3256933, np.nan, 1e6, -1e6, 0], np.float32)
    kept = appended(x, ml_dtypes.float8_e4m3fn, of=np.float32, k_scale=scale, v_scale=scale)
    np.testing.assert_array_equal(kept, [-0.1171875, 0.1171875, np.nan, 448, -448, 0])
    for dtype, bits in ((np.float16, 11), (ml_dtypes.bfloat16, 8)):
        step = 2.0 ** (1 - bits)      # of numbers above 1
        for sign in (1, -1):
            # A little more than the middle of the first two, a little less than that of the next.
            for middle, rest, wanted in ((1 + step / 2, 2.0**-30, 1 + step), (1 + 3 * step / 2, -(2.0**-30), 1 + step)):
                cos, sin = np.array([[middle]]), np.array([[-rest]])
                kept = appended([sign, sign], dtype, of=dtype, rotary=(cos, sin))
                assert kept[0] == sign * wanted, (dtype, sign, middle, rest)


# ---- arrays of others, and the documentation ----


def test_torch_tensors_in_place():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        k_cache, v_cache = (torch.full((2, 10, 2, 16), float("nan"), dtype=dtype) for _ in range(2))
        q, k_new, v_new = (torch.randn(2, 3, h, 16, dtype=dtype) for h in (8, 2, 2))
        lens = torch.tensor([0, 0], dtype=torch.int32)
        out, lse = flashgqa.attention_with_kvcache(
            q, k_cache, v_cache, k_new, v_new, cache_lens=lens, causal=True, layout="bshd", return_lse=True
        )
        assert type(out) is torch.Tensor and out.dtype == dtype and lse.dtype == torch.float32
        assert torch.equal(k_cache[:, :3], k_new) and torch.equal(v_cache[:, :3], v_new)
        assert torch.isnan(k_cache[:, 3:]).all()
        assert torch.equal(out, flashgqa.attention(q, k_new, v_new, causal=True, layout="bshd"))


def test_torch_float8_cache():
    torch = pytest.importorskip("torch")
    k_cache = torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn)
    v_cache, new = k_cache.clone(), torch.randn(1, 1, 2, 16)
    flashgqa.attention_with_kvcache(new, k_cache, v_cache, new, new, cache_lens=1)
    assert torch.equal(k_cache[:, :, 1:3].float(), new.to(torch.float8_e4m3fn).float())


def test_reference_takes_the_same_arguments():
    ours = inspect.signature(flashgqa.attention_with_kvcache).parameters
    case = CacheCase(sq=2, new=2)
    tensors, options = build(case)
    given = {name: p.default for name, p in ours.items() if p.kind is p.KEYWORD_ONLY} | options
    out, lse = reference.attention_with_kvcache(*tensors, **given | {"return_lse": True})
    assert out.shape == tensors[0].shape and lse.shape == out.shape[:3]


def test_arguments_are_handed_over_in_the_order_of_C():
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(kvcache))) if isinstance(n, ast.Call)]
    call = next(n for n in calls if getattr(n.func, "id", "") == "_attention")
    names = [getattr(argument, "id", None) for argument in call.args]
    first = kvcache._C.attention_with_kvcache.__doc__.split("(")[1].split(", *OPTIONS")[0].split(", ")
    local = {"rotary_cos": "cos", "rotary_sin": "sin"}
    assert names[: len(first)] == [local.get(name, name) for name in first]
    known = inspect.signature(flashgqa.attention_with_kvcache).parameters
    assert names[len(first) :] == [name if name in known else None for name in kvcache._C.OPTIONS]


def test_explain_takes_the_same_arguments_and_writes_nothing():
    first = kvcache._C.attention_with_kvcache.__doc__.split("(")[1].split(", *OPTIONS")[0].split(", ")
    assert list(kvcache._ARGUMENTS) == first
    case = CacheCase(sq=2, new=2, pages=16, pairs=8, g=3)
    tensors, options = build(case)
    before = [memory_of(x).tobytes() for x in tensors]
    plan = flashgqa.explain_with_kvcache(*tensors, **options, return_lse=True)
    assert (plan["b"], plan["hk"], plan["hq"], plan["sq"], plan["sk"]) == (3, 2, 6, 2, 72) and plan["kernel"].startswith("fwd_")
    assert "KV cache of float32, pages of 16, 2 new" in str(plan)
    assert [memory_of(x).tobytes() for x in tensors] == before
    with pytest.raises(ValueError, match="cache_lens"):
        flashgqa.explain_with_kvcache(*tensors, **options | {"cache_lens": 100})
    with pytest.raises(TypeError, match="unexpected keyword"):
        flashgqa.explain_with_kvcache(*tensors, is_causal=True)
    with pytest.raises(ValueError, match="rotary_interleaved is given without rotary"):
        flashgqa.explain_with_kvcache(*tensors, **options | {"rotary": None, "rotary_interleaved": True})


def test_stubs_name_what_exists():
    stub = ast.parse(pathlib.Path(kvcache.__file__).with_suffix(".pyi").read_text())
    options = next(n for n in stub.body if getattr(n, "name", "") == "_CacheOptions")
    known = inspect.signature(flashgqa.attention_with_kvcache).parameters
    assert {n.target.id for n in options.body if hasattr(n, "target")} | {"return_lse"} == {
        name for name, p in known.items() if p.kind is p.KEYWORD_ONLY
    }
    assert set(kvcache.__all__) <= {getattr(n, "name", "") for n in stub.body}


def test_docstrings_run():
    assert doctest.testmod(kvcache).failed == 0
