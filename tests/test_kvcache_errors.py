"""Calls of attention_with_kvcache that are refused: what the error says, and that not one byte has changed."""

import numpy as np
import pytest
from checking import memory_of, place
from hypothesis import event, given, settings
from hypothesis import strategies as st

import flashgqa

B, HQ, HK, SLOTS, D, NEW, PAGE = 3, 4, 2, 12, 8, 2, 4


class Call:
    """A good call, to be spoiled: each test changes what it is about."""

    def __init__(self, paged=False):
        rng = np.random.default_rng(0)

        def random(*shape):
            return place(rng.standard_normal(shape).astype(np.float32))

        self.q, self.k_new, self.v_new = random(B, HQ, NEW, D), random(B, HK, NEW, D), random(B, HK, NEW, D)
        shape = (B * SLOTS // PAGE, HK, PAGE, D) if paged else (B, HK, SLOTS, D)
        self.k_cache, self.v_cache = random(*shape), random(*shape)
        self.options = {"cache_lens": np.array([1, 10, 5], np.int32)}
        if paged:
            self.options["page_table"] = np.arange(B * SLOTS // PAGE, dtype=np.int32).reshape(B, -1)

    def run(self, **changes):
        for name, x in changes.items():
            if hasattr(self, name):
                setattr(self, name, x)
            else:
                self.options[name] = x
        return flashgqa.attention_with_kvcache(self.q, self.k_cache, self.v_cache, self.k_new, self.v_new, **self.options)

    def arrays(self):
        options = list(self.options.values())
        pairs = [y for x in options if isinstance(x, tuple) for y in x]
        tensors = [self.q, self.k_cache, self.v_cache, self.k_new, self.v_new, *options, *pairs]
        return [memory_of(x) for x in tensors if isinstance(x, np.ndarray)]


def refused(error, text, call=None, **changes):
    call = call or Call()
    for name in list(changes):
        if hasattr(call, name):
            setattr(call, name, changes.pop(name))
    call.options.update(changes)
    before = [x.tobytes() for x in call.arrays()]
    with pytest.raises(error, match=text) as caught:
        call.run()
    assert [x.tobytes() for x in call.arrays()] == before, "something was written"
    return str(caught.value)


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*values):
    return np.array(values, np.int32)


def test_the_good_calls_are_good():
    for paged in (False, True):
        call = Call(paged)
        before = memory_of(call.k_cache).copy()
        call.run()
        assert (memory_of(call.k_cache).view(np.int32) != before.view(np.int32)).sum() == B * HK * NEW * D


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("lens, text", [
    ((1, 11, 5), r"cache_lens\[1\] is 11 and 2 new keys are appended: 13 do not fit into the 12 slots"),
    ((1, 10, 13), r"cache_lens\[2\] is 13: with this cache it must be 0 to 12"),
    ((-1, 10, 5), r"cache_lens\[0\] is -1"),
    ((1, 10, 2**31 - 1), r"cache_lens\[2\] is 2147483647"),
])  # fmt: skip
def test_lengths_beyond_the_cache(paged, lens, text):
    refused(ValueError, text, Call(paged), cache_lens=i32(*lens))


def test_an_integer_for_all_lengths():
    refused(ValueError, r"cache_lens\[0\] is 11 and 2 new keys", cache_lens=11)
    assert Call().run(cache_lens=10).shape == (B, HQ, NEW, D)
    for length in (-1, 2**31, 2**70):
        refused(ValueError, f"cache_lens is {length}: it must be 0 to", cache_lens=length)
    refused(TypeError, "cache_lens is bool: it must be a NumPy array", cache_lens=True)
    refused(TypeError, "q is list: it must be a NumPy array", q=[1], cache_lens=3)
    refused(TypeError, "q is None", q=None, cache_lens=3)
    refused(ValueError, "q has 0 dimensions", q=np.float32(1)[...], cache_lens=3)


@pytest.mark.parametrize("row, column, page", [(0, 0, 9), (1, 2, -1), (2, 1, 2**31 - 1)])
def test_pages_that_do_not_exist(row, column, page):
    call = Call(paged=True)
    call.options["page_table"][row, column] = page
    text = refused(ValueError, rf"page_table\[{row}, {column}\] is {page} but k_cache has 9 pages", call)
    assert f"of sequence {row}" in text


def test_entries_that_are_not_used_may_be_anything():
    call = Call(paged=True)
    call.options["page_table"][0, 1:] = -5
    call.options["page_table"][2, 2:] = 10**9
    call.run()


def test_slots_written_twice_or_read():
    call = Call(paged=True)
    call.options["cache_lens"] = i32(4, 10, 4)
    call.options["page_table"][2, 1] = call.options["page_table"][0, 1]
    refused(ValueError, "slot 0 of page 1 to the new keys of sequence 0 and of sequence 2", call)
    call.options["cache_lens"] = i32(4, 10, 8)       # sequence 2 reads the page that sequence 0 writes
    refused(ValueError, "slot 0 of page 1 to the new keys of sequence 0, but sequence 2 has keys there", call)
    call.options["new_lens"] = i32(0, 2, 2)          # and that is all right if nobody writes
    call.run()
    call = Call(paged=True)                          # a sequence that has a page twice
    call.options["page_table"][1, 2] = call.options["page_table"][1, 0]
    refused(ValueError, "sequence 1, but sequence 1 has keys there", call)


def test_batch_index():
    refused(ValueError, r"batch_index\[1\] is 3 but k_cache has 3 rows", batch_index=i32(0, 3, 1))
    refused(ValueError, r"batch_index\[0\] is -1", batch_index=i32(-1, 2, 1))
    refused(ValueError, "slot 5 of row 1 to the new keys of sequence 0 and of sequence 2", batch_index=i32(1, 2, 1),
            cache_lens=i32(5, 10, 5))
    refused(ValueError, "batch_index is given together with page_table", Call(paged=True), batch_index=i32(0, 1, 2))
    refused(ValueError, "k_cache has batch size 4 but q has 3", k_cache=f32(4, HK, SLOTS, D), v_cache=f32(4, HK, SLOTS, D))


def test_read_only_cache():
    for name in ("k_cache", "v_cache"):
        call = Call()
        getattr(call, name).flags.writeable = False
        refused(ValueError, f"{name} is read-only", call)
    call = Call()
    for x in (call.k_cache, call.v_cache):
        x.flags.writeable = False
    call.k_new = call.v_new = None
    call.run()


def test_jax_arrays_can_be_read_but_not_written():
    jax = pytest.importorskip("jax")
    call = Call()
    arrays = {name: jax.numpy.array(getattr(call, name)) for name in ("q", "k_cache", "v_cache", "k_new", "v_new")}
    with pytest.raises(ValueError, match="k_cache is (read-only|exported by an unversioned DLPack capsule)"):
        call.run(**arrays)
    assert (np.asarray(arrays["k_cache"]) == Call().k_cache).all()
    assert call.run(k_new=None, v_new=None).shape == (B, HQ, NEW, D)


@pytest.mark.parametrize("changes, text", [
    ({"q": f32(HQ, NEW, D)}, r"q has 3 dimensions, shape \(4, 2, 8\): it must have 4, \[b, h, s, d\]"),
    ({"k_cache": f32(B, SLOTS, D)}, r"k_cache has 3 dimensions.*\[b, hk, slots, d\]"),
    ({"k_cache": f32(B, HK, SLOTS, 9)}, "k_cache has head dim 9 but q has 8"),
    ({"v_cache": f32(B, HK, 11, D)}, "v_cache has length 11 but k_cache has 12"),
    ({"v_cache": f32(B, 1, SLOTS, D)}, "v_cache has head count 1 but k_cache has 2"),
    ({"k_cache": f32(B, 3, SLOTS, D)}, r"k_cache has 3 heads but q has 4: .*4 % k_cache heads 3"),
    ({"k_cache": f32(2, HK, SLOTS, D), "v_cache": f32(2, HK, SLOTS, D)}, "k_cache has batch size 2 but q has 3"),
    ({"k_new": f32(B, HK, NEW, 9)}, "k_new has head dim 9 but k_cache has 8"),
    ({"k_new": f32(2, HK, NEW, D)}, "k_new has batch size 2 but q has 3"),
    ({"v_new": f32(B, HK, 3, D)}, "v_new has length 3 but k_new has 2"),
    ({"v_new": f32(B, 4, NEW, D)}, "v_new has head count 4 but v_cache has 2"),
    ({"v_new": None}, "k_new is given without v_new"),
    ({"cache_lens": None}, "k_new is given without cache_lens"),
    ({"cache_lens": i32(1, 2)}, r"cache_lens has shape \(2,\): it must be \[b\] = \(3,\)"),
    ({"new_lens": i32(1, 3, 0)}, r"new_lens\[1\] is 3 but k_new has 2 rows"),
    ({"left_pad": i32(1, 13, 0)}, r"left_pad\[1\] is 13: it must be 0 to 12"),
    ({"q_lens": i32(1, 3, 0)}, r"q_lens\[1\] is 3 but q has length 2"),
    ({"k_new": None, "v_new": None, "new_lens": i32(1, 1, 1)}, "new_lens is given without k_new"),
    ({"rotary": (f32(20, 5), f32(20, 5))}, r"rotary\[0\] \(cos\) has shape \(20, 5\), 5 pairs: 1 to d / 2 = 4"),
    ({"rotary": (f32(20, 4), f32(20, 3))}, r"rotary\[1\] \(sin\) has shape \(20, 3\) but rotary\[0\] has \(20, 4\)"),
    ({"rotary": (f32(11, 4), f32(11, 4))}, "rotary has 11 positions but sequence 1 needs 10 to 11"),
    ({"rotary": (f32(20, 4), f32(20, 4)), "rotary_offsets": i32(0, 19, 0)}, r"1 needs 19 to 20 \(rotary_offsets is 19\)"),
    ({"rotary": (f32(20, 4), f32(20, 4)), "q": f32(B, HQ, 4, D)}, "sequence 0 needs -1 to 2"),
    ({"rotary": (f32(20), f32(20))}, r"rotary\[0\] \(cos\) has shape \(20,\): it must have 2 dimensions, \[positions, pairs\]"),
    ({"rotary": (f32(20, 4), f32(20, 4, 1))}, r"rotary\[1\] \(sin\) has shape \(20, 4, 1\): it must have 2 dimensions"),
    ({"rotary_offsets": i32(0, 0, 0)}, "rotary_offsets is given without rotary"),
    ({"rotary_interleaved": True}, "rotary_interleaved is given without rotary"),
    ({"k_scale": f32(HK) + 1}, "k_scale is given but the cache has dtype float32"),
    ({"window": (-1, 0)}, r"window\[0\] is -1"),
    ({"softcap": 0.0}, "softcap is 0"),
    ({"sink": f32(3)}, r"sink has shape \(3,\)"),
    ({"out": f32(B, HQ, NEW, 9)}, "out has shape"),
    ({"stream": 5}, "stream is 5 but q is on cpu"),
    ({"kernel": "fwd_nothing"}, "no forward kernel for CPU has that name"),
])  # fmt: skip
def test_values(changes, text):
    refused(ValueError, text, **changes)


@pytest.mark.parametrize("changes, text", [
    ({"k_cache": np.zeros((B, HK, SLOTS, D))}, "k_cache has dtype float64 but q has float32"),
    ({"v_cache": np.zeros((B, HK, SLOTS, D))}, "v_cache has dtype float64: like k_cache it must be float32"),
    ({"k_new": np.zeros((B, HK, NEW, D))}, "k_new has dtype float64: like q it must be float32"),
    ({"cache_lens": np.array([1, 2, 3])}, "cache_lens has dtype int64: it must be int32"),
    ({"page_table": np.zeros((B, 3))}, "page_table has dtype float64: it must be int32"),
    ({"rotary": f32(20, 4)}, "rotary is ndarray: it must be None or a pair"),
    ({"rotary": (f32(20, 4), None)}, "rotary is tuple"),
    ({"rotary": (f32(20, 4).astype(int), f32(20, 4))}, r"rotary\[0\] \(cos\) has dtype int64"),
    ({"k_cache": None}, "k_cache is None"),
    ({"k_cache": "cache"}, "k_cache is str"),
])  # fmt: skip
def test_types(changes, text):
    refused(TypeError, text, **changes)


def test_page_tables():
    refused(ValueError, r"page_table has shape \(9,\): it must be \[b, pages of a sequence\] = \(3, any\)", Call(True),
            page_table=i32(*range(9)))
    refused(ValueError, r"page_table has shape \(2, 3\)", Call(True), page_table=i32([0, 1, 2], [3, 4, 5]))
    refused(ValueError, "page_table is given without cache_lens", Call(True), cache_lens=None, k_new=None, v_new=None)
    refused(ValueError, "k_cache has page size 0", Call(True), k_cache=f32(9, HK, 0, D), v_cache=f32(9, HK, 0, D))
    refused(ValueError, r"v_cache has number of pages 8 but k_cache has 9", Call(True), v_cache=f32(8, HK, PAGE, D))


def test_scales():
    import ml_dtypes

    float8 = np.dtype(ml_dtypes.float8_e4m3fn)
    cache = {"k_cache": np.zeros((B, HK, SLOTS, D), float8), "v_cache": np.zeros((B, HK, SLOTS, D), float8)}
    refused(ValueError, r"k_scale has shape \(4,\): it must be \[hk\] = \(2,\) or \[b, hk\]", k_scale=f32(4) + 1, **cache)
    refused(TypeError, "v_scale has dtype float64", v_scale=np.ones(2), **cache)
    for wrong in (0, -1, np.nan, np.inf):
        refused(ValueError, "v_scale of KV head 1 is", v_scale=np.array([1, wrong], np.float32), **cache)


def test_memory_that_is_shared():
    memory = f32(B, HK, SLOTS, D)
    refused(ValueError, "v_cache overlaps k_cache", k_cache=memory, v_cache=memory)
    refused(ValueError, "k_cache overlaps k_new", k_cache=memory, k_new=memory[:, :, :NEW])
    refused(ValueError, "v_cache overlaps q", v_cache=memory, q=memory[:, :, :NEW])
    wide = f32(B, HQ, SLOTS, D)
    refused(ValueError, "out overlaps k_cache", k_cache=wide[:, :HK], out=wide[:, :, :NEW])
    broadcast = np.lib.stride_tricks.as_strided(memory, strides=(0, *memory.strides[1:]))
    refused(ValueError, "k_cache has overlapping elements", k_cache=broadcast)
    lens = memory.view(np.int32).reshape(-1)[:B]
    lens[:] = (1, 10, 5)
    refused(ValueError, "k_cache overlaps cache_lens", k_cache=memory, cache_lens=lens)
    # Keys and values side by side in one array do not share an element, whatever the axis.
    for axis in range(5):
        values = np.random.default_rng(axis).standard_normal(np.insert((B, HK, SLOTS, D), axis, 2))
        k_cache, v_cache = np.moveaxis(values.astype(np.float32), axis, 0)
        k_apart, v_apart = k_cache.copy(), v_cache.copy()
        assert (Call().run(k_cache=k_cache, v_cache=v_cache) == Call().run(k_cache=k_apart, v_cache=v_apart)).all()
        assert (k_cache == k_apart).all() and (v_cache == v_apart).all()


def test_what_is_not_there_yet():
    refused(NotImplementedError, "v_cache has head dim dv = 300", v_cache=f32(B, HK, SLOTS, 300))
    refused(ValueError, "device is \"cuda\" but q is on cpu: a cache stays where it is", device="cuda")


def test_interrupted_call_leaves_the_cache_as_it_was():
    """Ctrl-C in the middle of the computation, when new keys are in the cache already."""
    import signal
    import threading

    rng = np.random.default_rng(0)
    q, new = (rng.standard_normal((1, h, 4096, 64)).astype(np.float32) for h in (32, 1))
    cache = rng.standard_normal((1, 1, 8192, 64)).astype(np.float32)
    k_cache, v_cache = cache.copy(), cache.copy()
    timer = threading.Timer(0.15, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            flashgqa.attention_with_kvcache(q, k_cache, v_cache, new, new, cache_lens=4000, causal=True)
            k_cache[...], v_cache[...] = cache, cache
    timer.join()
    assert (k_cache == cache).all() and (v_cache == cache).all()


@given(st.data())
@settings(max_examples=300)
def test_tables_are_refused_exactly_where_they_must_be(data):
    """Random tables against the definition, slot by slot."""
    b, page_size, columns, new = (data.draw(st.integers(1, n)) for n in (3, 4, 3, 3))
    slots, pages = columns * page_size, data.draw(st.integers(1, 9))
    numbers = st.integers(0, pages - 1) if data.draw(st.booleans()) else st.integers(-1, pages)
    table = [[data.draw(numbers) for _ in range(columns)] for _ in range(b)]
    lens = [data.draw(st.integers(0, slots)) for _ in range(b)]
    added = [data.draw(st.integers(0, new)) for _ in range(b)]
    pad = [data.draw(st.integers(0, n // 2)) for n in lens]

    def place_of(n, slot):
        return table[n][slot // page_size], slot % page_size

    good = all(length + more <= slots for length, more in zip(lens, added, strict=True))
    if good:
        written = [place_of(n, slot) for n in range(b) for slot in range(lens[n], lens[n] + added[n])]
        read = [place_of(n, slot) for n in range(b) for slot in range(pad[n], lens[n])]
        exist = all(0 <= page < pages for page, _ in written + read)
        good = exist and len(set(written)) == len(written) and not set(written) & set(read)
    caches = [np.zeros((pages, 1, page_size, 2), np.float32) for _ in range(2)]
    rows = f32(b, 1, new, 2) + 1
    options = {"cache_lens": lens, "new_lens": added, "left_pad": pad, "page_table": table}
    options = {name: np.array(x, np.int32) for name, x in options.items()}
    event(f"good: {good}")
    if good:
        flashgqa.attention_with_kvcache(rows, *caches, rows, rows, **options)
        assert caches[0].sum() == 2 * len(written)
    else:
        with pytest.raises(ValueError):
            flashgqa.attention_with_kvcache(rows, *caches, rows, rows, **options)
        assert not caches[0].any() and not caches[1].any()
