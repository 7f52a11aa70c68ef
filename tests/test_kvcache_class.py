"""KVCache against a plain model of it: one list of tokens a sequence, and a pool that is never larger than needed."""

import concurrent.futures
import copy
import gc
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import flashgqa

HK, D, DV, PAGE, CAPACITY = 2, 4, 3, 4, 14


def tokens(rng, b, n):
    return rng.standard_normal((b, HK, n, D)).astype(np.float32), rng.standard_normal((b, HK, n, DV)).astype(np.float32)


def through_bytes(x):
    return pickle.loads(pickle.dumps(x))


class Machine(RuleBasedStateMachine):
    """Two caches in one pool, a random life; after each step all their sequences hold what the model says."""

    @initialize(batch=st.integers(1, 3), seed=st.integers(0, 1000))
    def start(self, batch, seed):
        gc.freeze()     # frameworks that other tests imported: collections need not look through them
        self.rng = np.random.default_rng(seed)
        self.caches = [flashgqa.KVCache(batch, HK, D, value_dim=DV, capacity=CAPACITY, page_size=PAGE, pages=24)]
        self.model = [[(np.zeros((HK, 0, D), "f4"), np.zeros((HK, 0, DV), "f4"))] * batch]

    def pick(self, which):
        n = which % len(self.caches)
        return n, self.caches[n], self.model[n]

    @rule(which=st.integers(0, 1), rows=st.integers(0, 6), data=st.data())
    def append(self, which, rows, data):
        n, cache, model = self.pick(which)
        lens = [data.draw(st.integers(0, rows)) for _ in model]
        if data.draw(st.booleans()):
            lens = [rows] * len(model)
        given = data.draw(st.sampled_from([lens, np.array(lens, np.int32)])) if len(set(lens) | {rows}) > 1 else None
        k, v = tokens(self.rng, len(model), rows)
        before = cache.page_table, cache.lens
        try:
            cache.append(k, v, new_lens=given)
        except (ValueError, MemoryError) as error:
            too_long = any(x[0].shape[1] + added > CAPACITY for x, added in zip(model, lens, strict=True))
            assert isinstance(error, ValueError if too_long else MemoryError)
            assert (cache.page_table == before[0]).all() and (cache.lens == before[1]).all()
            return
        self.model[n] = [
            tuple(np.concatenate([old, new[i, :, : lens[i]]], axis=1) for old, new in zip(model[i], (k, v), strict=True))
            for i in range(len(model))
        ]

    @rule(which=st.integers(0, 1), data=st.data())
    def reorder(self, which, data):
        n, cache, model = self.pick(which)
        order = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=4))
        cache.reorder(order)
        self.model[n] = [model[i] for i in order]

    @rule(which=st.integers(0, 1), length=st.integers(0, CAPACITY))
    def crop(self, which, length):
        n, cache, model = self.pick(which)
        cache.crop(length)
        self.model[n] = [tuple(x[:, :length] for x in both) for both in model]

    @rule(copied=st.sampled_from([copy.deepcopy, through_bytes]))
    def move_to_another_pool(self, copied):
        self.caches = copied(self.caches)
        gc.collect()

    @precondition(lambda self: len(self.caches) == 1)
    @rule(data=st.data())
    def fork(self, data):
        chosen = data.draw(st.none() | st.lists(st.integers(0, len(self.model[0]) - 1), min_size=1, max_size=3))
        self.caches.append(self.caches[0].fork(chosen))
        self.model.append(list(self.model[0]) if chosen is None else [self.model[0][i] for i in chosen])

    @precondition(lambda self: len(self.caches) == 2)
    @rule(which=st.integers(0, 1))
    def drop(self, which):
        del self.caches[which], self.model[which]
        gc.collect()

    def teardown(self):
        gc.unfreeze()

    @invariant()
    def holds_what_the_model_says(self):
        pages = set()
        for cache, model in zip(getattr(self, "caches", ()), getattr(self, "model", ()), strict=True):
            assert len(cache) == len(model)
            for n, both in enumerate(model):
                for got, wanted in zip(cache.sequence(n), both, strict=True):
                    assert got.shape == wanted.shape and (got == wanted).all()
            table = cache.page_table
            assert ((table >= 0).sum(axis=1) == -(-cache.lens // PAGE)).all()
            pages |= set(table[table >= 0].tolist())
        if hasattr(self, "caches"):
            assert self.caches[0].bytes_used == len(pages) * PAGE * HK * (D + DV) * 4, "a page leaks, or is counted twice"


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
TestKVCache = Machine.TestCase


def test_attention_is_that_over_all_tokens():
    rng = np.random.default_rng(0)
    for layout in ("bhsd", "bshd"):
        swap = (lambda x: x.swapaxes(1, 2)) if layout == "bshd" else (lambda x: x)
        q = swap(rng.standard_normal((2, 3 * HK, 10, D)).astype(np.float32))
        k, v = (swap(x) for x in tokens(rng, 2, 10))
        cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=10, page_size=3, layout=layout)
        whole = flashgqa.attention(q, k, v, causal=True, layout=layout)
        for rows in (slice(0, 6), slice(6, 7), slice(7, 10)):
            part = [x[:, rows] if layout == "bshd" else x[:, :, rows] for x in (q, k, v, whole)]
            out, lse = cache.attention(*part[:3], causal=True, return_lse=True)
            np.testing.assert_allclose(out, part[3], rtol=0, atol=1e-6)
            assert lse.shape == (2, 3 * HK, rows.stop - rows.start)
        assert (cache.lens == 10).all()
        last = (slice(None), slice(9, 10)) if layout == "bshd" else (slice(None), slice(None), slice(9, 10))
        np.testing.assert_allclose(cache.attention(q[last], causal=True), whole[last], rtol=0, atol=1e-6)


def test_torch_and_float8():
    torch = pytest.importorskip("torch")
    q, new = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    scale = torch.full((2,), 0.01)
    options = {"dtype": "float8_e4m3", "page_size": 2, "library": "torch", "k_scale": scale, "v_scale": scale}
    cache = flashgqa.KVCache(1, 2, 16, capacity=8, **options)
    assert cache.k.dtype == torch.float8_e4m3fn and cache.bytes_allocated == 8 * 2 * 2 * 16
    out = cache.attention(q, new, new, causal=True)
    held = cache.sequence(0)[0].float() * 0.01
    assert type(out) is torch.Tensor
    assert torch.equal(held, (new[0] / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01)
    torch.testing.assert_close(out, flashgqa.attention(q, held[None], held[None], causal=True))
    fork = cache.fork()
    fork.append(new, new)
    assert fork.lens == [6] and torch.equal(cache.sequence(0)[0].float() * 0.01, held)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_bytes])
def test_copies_live_on_their_own(copied):
    """A copy that goes takes none of the original's pages with it, and what one appends is not in the other."""
    rng = np.random.default_rng(0)
    cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=CAPACITY, page_size=PAGE, pages=24)
    k, v = tokens(rng, 2, 6)
    cache.append(k, v)
    used = cache.bytes_used
    copied(cache)
    gc.collect()
    assert cache.bytes_used == used > 0
    other = copied(cache)
    other.append(*tokens(rng, 2, 5))
    assert (cache.lens == 6).all() and (other.lens == 11).all()
    del other
    gc.collect()
    assert cache.bytes_used == used
    for n in range(2):
        np.testing.assert_array_equal(cache.sequence(n)[0], k[n])
        np.testing.assert_array_equal(cache.sequence(n)[1], v[n])


@pytest.mark.parametrize("copied", [copy.deepcopy, through_bytes])
def test_a_pool_of_its_own_holds_no_page_of_others(copied):
    rng = np.random.default_rng(0)
    cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=CAPACITY, page_size=PAGE, pages=4)
    cache.append(*tokens(rng, 2, 6))
    fork = cache.fork([0])
    cache.crop(0)
    other = copied(cache)
    assert cache.bytes_used == 2 * PAGE * HK * (D + DV) * 4 and other.bytes_used == 0
    other.append(*tokens(rng, 2, 8))        # all four pages
    assert fork.lens == [6] and other.bytes_used == other.bytes_allocated


def test_forks_grow_in_threads_of_their_own():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        cache = flashgqa.KVCache(1, HK, D, value_dim=DV, capacity=300, page_size=2, pages=5000)
        start = tokens(np.random.default_rng(0), 1, 2)
        cache.append(*start)
        forks = [cache.fork() for _ in range(6)]

        def grow(n):
            row = np.full((1, HK, 1, D), n, np.float32), np.full((1, HK, 1, DV), n, np.float32)
            for _ in range(250):
                forks[n].append(*row)

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(grow, range(6)))
    finally:
        sys.setswitchinterval(before)
    for n, fork in enumerate(forks):
        for held, first in zip(fork.sequence(0), start, strict=True):
            assert (held[:, :2] == first[0]).all() and (held[:, 2:] == n).all()
    assert cache.bytes_used == (6 * 125 + 1) * 2 * HK * (D + DV) * 4


def test_a_page_that_cannot_be_copied_costs_none():
    """Tensors made in inference mode cannot be written by torch outside of it."""
    torch = pytest.importorskip("torch")
    new = torch.ones(1, HK, 3, D)
    with torch.inference_mode():
        cache = flashgqa.KVCache(1, HK, D, capacity=CAPACITY, page_size=PAGE, pages=4, library="torch")
    cache.append(new, new)
    fork = cache.fork()
    used = cache.bytes_used
    for _ in range(5):
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            fork.append(new, new)
    assert fork.bytes_used == used and (fork.lens == 3).all() and (fork.page_table == cache.page_table).all()


@pytest.mark.parametrize("new_lens", [2, [2, 2], np.int64(2), np.array([2, 2]), np.array([2, 2], np.uint8)])
def test_new_lens_are_any_integers(new_lens):
    rng = np.random.default_rng(0)
    cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=CAPACITY, page_size=PAGE)
    k, v = tokens(rng, 2, 3)
    cache.append(k, v, new_lens=new_lens)
    assert (cache.lens == 2).all()
    np.testing.assert_array_equal(cache.sequence(1)[1], v[1, :, :2])


def test_new_lens_count_where_pages_have_room_too():
    rng = np.random.default_rng(0)
    cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=CAPACITY, page_size=8)
    k, v = tokens(rng, 2, 3)
    for new_lens, lens in ((None, [3, 3]), ([1, 3], [4, 6]), ([0, 2], [4, 8])):
        cache.append(k, v, new_lens=new_lens)
        assert cache.lens.tolist() == lens
    for n, parts in enumerate(((3, 1, 0), (3, 3, 2))):
        for held, new in zip(cache.sequence(n), (k, v), strict=True):
            np.testing.assert_array_equal(held, np.concatenate([new[n, :, :rows] for rows in parts], axis=1))


def test_scales_of_sequences_follow_them():
    """k_scale [b, hk]: a sequence keeps its own through reorder() and fork(), for what it holds and for what it appends."""
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    scale = np.array([[0.5, 0.01], [0.02, 3], [1, 0.25]], np.float32)
    scales = {"k_scale": scale, "v_scale": scale[:, ::-1]}
    cache = flashgqa.KVCache(3, HK, D, capacity=8, page_size=3, pages=20, dtype="float8_e4m3", **scales)
    whole = [np.zeros((3, HK, 0, D))] * 2

    def attend(of, held, order, rows):
        q, k, v = (rng.standard_normal((len(order), h, rows, D)).astype(np.float32) for h in (3 * HK, HK, HK))
        out = of.attention(q, k, v, causal=True)
        held = [np.concatenate([old, x], axis=2) for old, x in zip(held, (k, v), strict=True)]
        stored = []
        for x, s in zip(held, (scale[order], scale[order][:, ::-1]), strict=True):
            stored.append((x / s[..., None, None]).clip(-448, 448).astype(of.k.dtype).astype(np.float64) * s[..., None, None])
        right = flashgqa.attention(q.astype(np.float64), *stored, causal=True)
        np.testing.assert_allclose(out, right, rtol=0, atol=1e-5)
        return held

    whole = attend(cache, whole, [0, 1, 2], 3)
    cache.reorder([2, 0])
    whole = attend(cache, [x[[2, 0]] for x in whole], [2, 0], 2)
    fork = cache.fork([1, 1, 0])
    attend(cache, whole, [2, 0], 1)
    attend(fork, [x[[1, 1, 0]] for x in whole], [0, 0, 2], 2)


def test_dtypes_by_any_name():
    import ml_dtypes

    for dtype in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert flashgqa.KVCache(1, 1, 8, capacity=4, dtype=dtype).k.dtype == ml_dtypes.bfloat16
    for dtype in ("float32", np.float32, np.dtype("f4")):
        assert flashgqa.KVCache(1, 1, 8, capacity=4, dtype=dtype).k.dtype == np.float32
    torch = pytest.importorskip("torch")
    assert flashgqa.KVCache(1, 1, 8, capacity=4, dtype=torch.float16, library="torch").v.dtype == torch.float16


@pytest.mark.parametrize("error, text, arguments", [
    (TypeError, "batch is 1.5: it must be an integer", {"batch": 1.5}),
    (TypeError, "batch is True: it must be an integer", {"batch": True}),
    (ValueError, "page_size is 0: it must be 1 or more", {"page_size": 0}),
    (ValueError, "head_dim is 9223372036854775808: it must be 2147483647 or less", {"head_dim": 2**63}),
    (ValueError, "pages is 2147483648: it must be 2147483647 or less", {"pages": 2**31}),
    (ValueError, "library is array", {"library": np.zeros(2)}),
    (ValueError, "device is array", {"device": np.zeros(2)}),
    (ValueError, "layout is array", {"layout": np.zeros(2)}),
    (TypeError, "dtype is 'int8'", {"dtype": "int8"}),
    (ValueError, "library is 'jax'", {"library": "jax"}),
    (ValueError, "device is 'cuda': NumPy arrays are on the CPU", {"device": "cuda"}),
    (ValueError, "layout is 'sbhd'", {"layout": "sbhd"}),
    (TypeError, "k_scale is list: it must be a float32 array", {"dtype": "float8_e4m3", "k_scale": [1.0]}),
])  # fmt: skip
def test_what_cannot_be_made(error, text, arguments):
    with pytest.raises(error, match=text):
        flashgqa.KVCache(**{"batch": 1, "num_kv_heads": 1, "head_dim": 8, "capacity": 9, **arguments})


def test_bfloat16_without_ml_dtypes_says_what_to_install():
    code = "import sys; sys.modules['ml_dtypes'] = None; import flashgqa; flashgqa.KVCache(1, 1, 8, capacity=9, dtype='bfloat16')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: dtype is 'bfloat16': NumPy has it by ml_dtypes; pip install ml_dtypes, or" in ran.stderr.splitlines()[-1]


def test_no_sequences_at_all():
    cache = flashgqa.KVCache(0, HK, D, capacity=8)
    cache.crop([])
    cache.append(*(x[:0] for x in tokens(np.random.default_rng(0), 1, 3)[:1] * 2), new_lens=[])
    assert len(cache) == 0 and cache.lens.shape == (0,)


def test_what_cannot_be_done():
    rng = np.random.default_rng(0)
    cache = flashgqa.KVCache(2, HK, D, value_dim=DV, capacity=8, page_size=PAGE, pages=3)
    k, v = tokens(rng, 2, 4)
    cache.append(k, v)
    table = cache.page_table
    for error, text, call in (
        (MemoryError, "2 more pages are needed and 1 of 3 are free", lambda: cache.append(k, v)),
        (ValueError, "sequence 0 has 4 slots in use and 8 new keys .* capacity of 8", lambda: cache.append(*tokens(rng, 2, 8))),
        (ValueError, "v_new has head dim", lambda: cache.append(k, k, new_lens=np.array([1, 0], np.int32))),
        (ValueError, "the cache has sequences 0 to 1", lambda: cache.reorder([0, 2])),
        (TypeError, "it must be a list of integers", lambda: cache.fork([0.5])),
        (ValueError, "lens is -1", lambda: cache.crop(-1)),
        (ValueError, r"lens is \[1\]: it must be an integer of 0 or more, or one for each of 2", lambda: cache.crop([1])),
        (ValueError, "new_lens is 1.5: it must be an integer", lambda: cache.append(k, v, new_lens=1.5)),
        (ValueError, r"new_lens is \[5, 5\] but k_new has 4 rows", lambda: cache.append(k, v, new_lens=5)),
        (TypeError, "page_table is what the cache itself says", lambda: cache.attention(k, k, v, page_table=table)),
        (TypeError, "got an unexpected keyword argument 'casual'", lambda: cache.attention(k, casual=True)),
        (TypeError, "k_new is list: it must be a NumPy array", lambda: cache.attention(k, k.tolist(), v)),
        (TypeError, "k_new is NoneType", lambda: cache.append(None, v)),
        (ValueError, "q has batch size 1 but the cache has 2 sequences", lambda: cache.attention(k[:1])),
        (ValueError, r"k_new has shape .* it must be \[2, 2, 'new', 4\]", lambda: cache.append(k[0], v[0])),
        (ValueError, r"k_new has shape .* it must be \[2, 2, 4, 4\]", lambda: cache.append(k[:, :1], v[:, :1])),
        (TypeError, "k_new has dtype float64: in this cache it must be float32", lambda: cache.append(k.astype(float), v)),
        (IndexError, "n is 2: the cache has 2 sequences", lambda: cache.sequence(2)),
        (TypeError, "n is 0.0: it must be an integer", lambda: cache.sequence(0.0)),
    ):
        with pytest.raises(error, match=text):
            call()
        assert (cache.page_table == table).all() and (cache.lens == 4).all()
        assert cache.bytes_used == 2 * PAGE * HK * (D + DV) * 4
    cache.crop(1)
    cache.append(k.astype(">f4")[:, :, :1], v[:, :, :1])


def test_what_requires_grad_is_named():
    torch = pytest.importorskip("torch")
    k = torch.ones(2, HK, 1, D, requires_grad=True)
    cache = flashgqa.KVCache(2, HK, D, capacity=8, library="torch")
    with pytest.raises(BufferError, match="k_new requires grad"):
        cache.append(k, k)
    with torch.no_grad():
        cache.append(k, k)
    assert (cache.lens == 1).all()


def test_a_generation_of_a_thousand_tokens():
    """Over the borders of blocks, pages and splits; float64, so that any wrong key would show."""
    rng = np.random.default_rng(0)
    s = 1000
    q, (k, v) = rng.standard_normal((1, 2 * HK, s, D)), (x.astype(np.float64) for x in tokens(rng, 1, s))
    cache = flashgqa.KVCache(1, HK, D, value_dim=DV, capacity=s, page_size=48, dtype="float64")
    out = np.empty((1, 2 * HK, s, DV))
    for i in range(s):
        out[:, :, i : i + 1] = cache.attention(*(x[:, :, i : i + 1] for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(out, flashgqa.attention(q, k, v, causal=True), rtol=0, atol=1e-12)
