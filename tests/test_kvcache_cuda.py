"""attention_with_kvcache and KVCache on a GPU: what only a GPU has. The cases of both devices are in test_kvcache.py."""

import re

import numpy as np
import pytest
import torch
from checking import EPSILON_OF
from gpu import get
from test_kvcache_class import CAPACITY, HK, PAGE

import flashgqa

DEVICE = "cuda"
ROWS = [None, "cache"]      # the plan's choice; the row that serves every call


def forced(row, dtype=torch.float16):
    name = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    return {} if row is None else {"kernel": f"fwd_sm80_{name}_d128_dv128_cache"}


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def bits(*tensors):
    return [x.contiguous().view(torch.uint8).cpu().numpy().tobytes() for x in tensors]


def angles(positions, pairs):
    phase = torch.arange(positions, device=DEVICE)[:, None] * 10000.0 ** -(torch.arange(pairs, device=DEVICE) / pairs)
    return phase.cos(), phase.sin()


# ---- graphs, streams, waiting ----


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("page_size", [None, 16, 48])
def test_one_captured_graph_generates_a_thousand_tokens(page_size, row):
    torch.manual_seed(0)
    steps, b, hq, hk, d, dtype = 1000, 2, 6, 2, 64, torch.float16
    q, k, v = (torch.randn(b, h, steps, d, device=DEVICE, dtype=dtype) for h in (hq, hk, hk))
    slots = page_size or steps + 8
    columns = -(-(steps + 8) // slots)
    options, rows = {"causal": True, **forced(row)}, b * columns
    if page_size:
        options["page_table"] = torch.randperm(rows, device=DEVICE).int().view(b, columns)
    caches = [torch.full((rows, hk, slots, d), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    lens, token = i32(0, 0), [torch.empty_like(x[:, :, :1]) for x in (q, k, v)]
    rotary = angles(steps + 8, 16)

    def step():
        out = flashgqa.attention_with_kvcache(token[0], *caches, *token[1:], cache_lens=lens, rotary=rotary, **options)
        lens.add_(1)
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    lens.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    results = torch.empty_like(q)
    for i in range(steps):
        for to, x in zip(token, (q, k, v), strict=True):
            to.copy_(x[:, :, i : i + 1])
        graph.replay()
        results[:, :, i : i + 1] = out
    assert lens.tolist() == [steps, steps]
    turned = []
    for x in (q, k):
        first, second = x[..., :16].double(), x[..., 16:32].double()
        cos, sin = (a[:steps].double() for a in rotary)
        turned.append(torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., 32:].double()], -1).to(dtype))
    expected = torch.nn.functional.scaled_dot_product_attention(
        turned[0].double(), *(x.double().repeat_interleave(hq // hk, 1) for x in (turned[1], v)), is_causal=True
    )
    assert (results.double() - expected).abs().max() < 4 * EPSILON_OF["float16"] * expected.abs().max()


@pytest.mark.parametrize("row", ROWS)
def test_nothing_waits_and_two_streams_do_not_meet(row):
    torch.manual_seed(0)
    b, hq, hk, d, slots = 3, 8, 2, 64, 700
    inputs = []
    for n in range(2):
        q, k, v = (torch.randn(b, h, 1, d, device=DEVICE, dtype=torch.float16) for h in (hq, hk, hk))
        caches = [torch.randn(b, hk, slots, d, device=DEVICE, dtype=torch.float16) for _ in range(2)]
        inputs.append((q, *caches, k, v, i32(5 + n, 600, 333)))

    def call(n):
        *tensors, lens = inputs[n]
        return flashgqa.attention_with_kvcache(*tensors, cache_lens=lens, causal=True, rotary=rotary, **forced(row))

    rotary = angles(slots, 8)
    alone = [call(n) for n in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            for n, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[n].append(call(n))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for n in range(2):
        assert all(torch.equal(x, alone[n]) for x in results[n])


@pytest.mark.parametrize("row", ROWS)
def test_batch_invariant(row):
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, h, 2, 64, device=DEVICE, dtype=torch.bfloat16) for h in (8, 2, 2))
    caches = [torch.randn(4, 2, 3000, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    lens = i32(2900, 17, 1234, 0)
    options = {"causal": True, "return_lse": True, "batch_invariant": True, **forced(row, torch.bfloat16)}
    out, lse = flashgqa.attention_with_kvcache(q, *caches, k, v, cache_lens=lens, **options)
    for n in range(4):
        part = [x[n : n + 1] for x in (q, *caches, k, v)]
        alone = flashgqa.attention_with_kvcache(*part, cache_lens=lens[n : n + 1], **options)
        assert torch.equal(alone[0], out[n : n + 1]) and torch.equal(alone[1], lse[n : n + 1])


# ---- index arrays that say something wrong ----

B, NEW, SIZE, COLUMNS, PAGES = 3, 2, 4, 3, 9


def paged_call(**changes):
    torch.manual_seed(0)
    memory = torch.full((2, 3, PAGES, 2, SIZE, 8), 7.0, device=DEVICE)      # guards before and behind each cache
    k_cache, v_cache = memory[0, 1], memory[1, 1]
    q, k, v = (torch.randn(B, h, NEW, 8, device=DEVICE) for h in (4, 2, 2))
    table = torch.arange(PAGES, dtype=torch.int32, device=DEVICE).view(B, COLUMNS)
    options = {"cache_lens": i32(1, 10, 5), "page_table": table, "causal": True} | changes
    if "batch_index" in changes:
        options["page_table"] = None
    return memory, (q, k_cache, v_cache, k, v), options


WRONG = {
    "cache_lens[1] is 13": {"cache_lens": (1, 13, 5)},
    "cache_lens[0] is -1": {"cache_lens": (-1, 10, 5)},
    "cache_lens[2] is 2147483647": {"cache_lens": (1, 10, 2**31 - 1)},
    "cache_lens[1] is 11 and 2 new keys are appended": {"cache_lens": (1, 11, 5)},
    "new_lens[2] is 3": {"new_lens": (0, 1, 3)},
    "new_lens[0] is -5": {"new_lens": (-5, 1, 2)},
    "left_pad[1] is 13": {"left_pad": (1, 13, 0)},
    "q_lens[1] is 9": {"q_lens": (1, 9, 0)},
    "page_table[1, 2] is 9": {"page_table": ((0, 1, 2), (3, 4, 9), (6, 7, 8))},
    "page_table[0, 0] is -7": {"page_table": ((-7, 1, 2), (3, 4, 5), (6, 7, 8))},
    "page_table[2, 1] is 1000000000": {"page_table": ((0, 1, 2), (3, 4, 5), (6, 10**9, 8))},
    "page_table gives slot": {"page_table": ((0, 1, 2), (3, 4, 0), (6, 7, 8)), "cache_lens": (1, 8, 5)},
    "batch_index[2] is 9": {"batch_index": (0, 1, 9), "cache_lens": (1, 2, 0)},
    "batch_index gives slot": {"batch_index": (0, 4, 4), "cache_lens": (1, 2, 1)},
    "rotary has 8 positions": {"rotary": True},
    "rotary_offsets is 7": {"rotary": True, "rotary_offsets": (0, 7, -3), "cache_lens": (1, 2, 1)},
}


def wrong_call(name):
    changes = {key: i32(*x) if isinstance(x, tuple) else x for key, x in WRONG[name].items()}
    if "rotary" in changes:
        changes["rotary"] = angles(8, 4)
    return paged_call(**changes)


@pytest.mark.parametrize("name", WRONG)
def test_check_names_row_and_value_and_writes_nothing(name):
    memory, tensors, options = wrong_call(name)
    before = bits(memory)
    with pytest.raises(ValueError, match=re.escape(name)):
        flashgqa.attention_with_kvcache(*tensors, **options, check=True)
    assert bits(memory) == before


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", WRONG)
def test_without_check_no_memory_around_is_touched(name, row):
    memory, tensors, options = wrong_call(name)
    flashgqa.attention_with_kvcache(*tensors, **options, **forced(row, torch.float32))
    torch.cuda.synchronize()
    assert (memory[:, 0] == 7).all() and (memory[:, 2] == 7).all()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("page", [7, -1, 2**30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_page_that_does_not_exist_reads_as_zeros_and_takes_nothing(page, row, dtype):
    torch.manual_seed(0)
    b, hq, hk, d, size = 2, 4, 2, 64, 16
    whole = torch.full((2, 9, hk, size, d), torch.nan, device=DEVICE, dtype=dtype)      # guards: the first page and the last
    whole[:, 1:8].normal_()
    caches, longer = whole[:, 1:8], torch.cat([whole[:, 1:8], torch.zeros_like(whole[:, :1])], 1)
    q, k, v = (torch.randn(b, h, 1, d, device=DEVICE, dtype=dtype) for h in (hq, hk, hk))
    options = {"causal": True, "return_lse": True, **forced(row, dtype)}

    def call(caches, page, lens, *new):
        table = i32(0, page, 2, 3, 4, page).view(b, 3)
        return flashgqa.attention_with_kvcache(q, *caches, *new, cache_lens=i32(*lens), page_table=table, **options)

    assert bits(*call(caches, page, (33, 48))) == bits(*call(longer, 7, (33, 48)))
    before = bits(whole)
    assert bits(*call(caches, page, (16, 33), k, v)) == bits(*call(longer, 7, (17, 34)))
    assert bits(whole) == before
    options["cache_lens"] = i32(9, 16)
    by_row = [flashgqa.attention_with_kvcache(q, *x, batch_index=i32(2, n), **options) for x, n in ((caches, page), (longer, 7))]
    assert bits(*by_row[0]) == bits(*by_row[1]) and (by_row[0][0][1] == 0).all()


def test_check_passes_what_is_right_and_is_refused_in_a_capture():
    memory, tensors, options = paged_call()
    other, same, _ = paged_call()
    out = flashgqa.attention_with_kvcache(*tensors, **options, check=True)
    assert torch.equal(out, flashgqa.attention_with_kvcache(*same, **options)) and torch.equal(memory, other)
    with pytest.raises(ValueError, match="while the stream records a graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flashgqa.attention_with_kvcache(*tensors, **options, check=True)
    torch.cuda.synchronize()


def test_check_of_more_sequences_than_a_block_has_threads():
    b, size, columns, new = 300, 4, 3, 6
    caches = [torch.zeros(b * columns, 1, size, 8, device=DEVICE) for _ in range(2)]
    q, k, v = (torch.randn(b, 1, new, 8, device=DEVICE) for _ in range(3))
    table = torch.arange(b * columns, dtype=torch.int32, device=DEVICE).view(b, columns)

    def call():
        return flashgqa.attention_with_kvcache(q, *caches, k, v, cache_lens=5, page_table=table, causal=True, check=True)

    call()
    before = bits(*caches)
    for row, column, words in (
        (290, 2, "sequence 3 and of sequence 290"),
        (290, 0, "sequence 3, but sequence 290 has keys there"),
    ):
        own = table[row, column].item()
        table[row, column] = table[3, 2]
        with pytest.raises(ValueError, match=rf"page_table gives slot 0 of page 11 to the new keys of {words}"):
            call()
        table[row, column] = own
    assert bits(*caches) == before


def test_arguments():
    _, tensors, options = paged_call()
    with pytest.raises(NotImplementedError, match="reads no KV cache"):
        flashgqa.attention_with_kvcache(*tensors, **options, kernel="fwd_sm80_f32_d64_dv64_general")
    with pytest.raises(ValueError, match="cache_lens is on cpu but q is on cuda:0"):
        flashgqa.attention_with_kvcache(*tensors, **options | {"cache_lens": options["cache_lens"].cpu()})
    with pytest.raises(NotImplementedError, match="for KV caches only"):
        flashgqa.attention(*[torch.randn(1, 1, 4, 8, device=DEVICE)] * 3, kernel="fwd_sm80_f32_d128_dv128_cache")
    out = flashgqa.attention_with_kvcache(*tensors, **options | {"cache_lens": 5})
    assert torch.equal(out, flashgqa.attention_with_kvcache(*tensors, **options | {"cache_lens": i32(5, 5, 5)}))


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_new", "v_new", "cache_lens", "page_table", "rotary"])
def test_an_argument_on_another_device_is_named_and_nothing_is_written(name):
    memory, tensors, options = paged_call(rotary=angles(20, 4))
    given = dict(zip(("q", "k_cache", "v_cache", "k_new", "v_new"), tensors, strict=True))
    moved = given if name in given else options
    moved[name] = tuple(x.cpu() for x in moved[name]) if name == "rotary" else moved[name].cpu()
    before = bits(memory, *given.values())
    with pytest.raises(ValueError, match="q is on cpu" if name == "q" else f"{name}.* is on cpu but q is on cuda:0"):
        flashgqa.attention_with_kvcache(*given.values(), **options)
    assert bits(memory, *given.values()) == before


def test_explain_names_the_row_and_why_others_do_not_serve():
    memory, tensors, options = paged_call()
    before = bits(memory)
    plan = flashgqa.explain_with_kvcache(*tensors, **options, rotary=angles(20, 4))
    assert plan["kernel"] == "fwd_sm80_f32_d128_dv128_cache" and plan["sk"] == SIZE * COLUMNS and bits(memory) == before
    assert ("fwd_sm80_f32_d64_dv64_general", "reads no KV cache") in plan["refused"]


# ---- other libraries, KVCache ----


def test_cupy():
    cupy = pytest.importorskip("cupy")
    _, tensors, options = paged_call()
    expected = flashgqa.attention_with_kvcache(*tensors, **options)
    moved = [cupy.asarray(x) for x in paged_call()[1]]
    given = {name: cupy.asarray(x) if torch.is_tensor(x) else x for name, x in options.items()}
    out = flashgqa.attention_with_kvcache(*moved, **given)
    assert isinstance(out, cupy.ndarray) and (cupy.asnumpy(out) == get(expected)).all()
    assert (cupy.asnumpy(moved[1]) == get(tensors[1])).all()
    assert flashgqa.attention_with_kvcache(*moved, page_table=given["page_table"], cache_lens=3).shape == out.shape


def test_jax_reads_but_does_not_write():
    jax = pytest.importorskip("jax")
    if jax.default_backend() == "cpu":
        pytest.skip("JAX without a GPU")
    _, (q, k_cache, v_cache, k, v), options = paged_call()
    arrays = {name: jax.device_put(get(x)) for name, x in zip("qKVkv", (q, k_cache, v_cache, k, v), strict=True)}
    given = {name: jax.device_put(get(x)) if torch.is_tensor(x) else x for name, x in options.items()}
    out = flashgqa.attention_with_kvcache(*(arrays[name] for name in "qKV"), **given)
    np.testing.assert_array_equal(np.asarray(out), get(flashgqa.attention_with_kvcache(q, k_cache, v_cache, **options)))
    with pytest.raises(ValueError, match="JAX arrays"):
        flashgqa.attention_with_kvcache(*(arrays[name] for name in "qKVkv"), **given)


@pytest.mark.parametrize("kind", ["torch", "address"])
def test_lengths_and_tables_of_the_host_go_the_way_of_the_given_stream(kind):
    """The current stream is busy: whatever waited for it would come too late."""
    caches = [flashgqa.KVCache(2, HK, 16, capacity=40, page_size=4, library="torch", device=d) for d in ("cpu", DEVICE)]
    tokens = [[torch.randn(2, h, 3, 16) for h in (2 * HK, HK, HK)] for _ in range(4)]
    near = [[x.to(DEVICE) for x in each] for each in tokens]
    slots = [torch.randn(2, HK, 40, 16) for _ in range(2)]
    near_slots = [x.to(DEVICE) for x in slots]
    side = torch.cuda.Stream()
    given = side if kind == "torch" else side.cuda_stream
    junk = [torch.full((n,), 10**9, dtype=torch.int32, device=DEVICE) for n in (2, 20) for _ in range(8)]
    del junk                                        # what new memory of the current stream holds
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    got = []
    for n, each in enumerate(near):
        if n == 2:
            fork = caches[1].fork()
        got.append(caches[1].attention(*each, causal=True, stream=given))
    got.append(fork.attention(*near[0], causal=True, stream=given))
    got.append(flashgqa.attention_with_kvcache(near[0][0], *near_slots, cache_lens=17, stream=given))
    side.synchronize()
    got = [x.cpu() for x in got]
    wanted = []
    for n, each in enumerate(tokens):
        if n == 2:
            fork = caches[0].fork()
        wanted.append(caches[0].attention(*each, causal=True))
    wanted.append(fork.attention(*tokens[0], causal=True))
    wanted.append(flashgqa.attention_with_kvcache(tokens[0][0], *slots, cache_lens=17))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_kvcache_leads_the_life_of_one_on_the_cpu(dtype, layout):
    torch.manual_seed(0)
    of_new = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    scale = torch.rand(2, HK) + 0.1 if dtype == "float8_e4m3" else None
    caches = []
    for device in ("cpu", DEVICE):
        scales = {} if scale is None else {"k_scale": scale.to(device), "v_scale": scale.flip(0).to(device)}
        caches.append(flashgqa.KVCache(
            2, HK, 16, capacity=CAPACITY, page_size=PAGE, pages=24, dtype=dtype, library="torch", device=device, layout=layout,
            **scales,
        ))  # fmt: skip
    assert caches[1].k.is_cuda

    def both(function, *arguments):
        return [function(cache, *(x.to(cache.k.device) if torch.is_tensor(x) else x for x in arguments)) for cache in caches]

    def attend(rows, lens=None):
        b = len(caches[0])
        q, k, v = (torch.randn(b, rows, h, 16, dtype=of_new) for h in (2 * HK, HK, HK))
        q, k, v = (x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v))
        results = both(lambda cache, *x: cache.attention(*x, new_lens=lens, causal=True), q, k, v)
        torch.testing.assert_close(results[1].cpu(), results[0], rtol=0, atol=3e-2 if dtype == "bfloat16" else 2e-5)

    attend(5)
    attend(3, np.array([3, 1], np.int32))
    both(lambda cache: cache.reorder([1, 0, 1]))
    attend(1)
    forks = both(lambda cache: cache.fork([2, 0]))
    both(lambda cache: cache.crop(6))
    attend(2)
    for n in range(3):
        held = both(lambda cache, n=n: cache.sequence(n))
        assert bits(*held[0]) == bits(*held[1])
    for n in range(2):
        held = [fork.sequence(n) for fork in forks]
        assert bits(*held[0]) == bits(*held[1])
    assert caches[0].bytes_used == caches[1].bytes_used
