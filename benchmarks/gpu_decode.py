"""The decode rows of bench.py gpu: one query token over a cache, replayed from a CUDA graph whose launches go over other keys and
values each time, more than 512 MB of them, so that none are in the L2 cache.

Against torch's cuDNN and FlashAttention-2 backends, and the time in which a kernel that does nothing else reads the same bytes
(bulk_read.py; torch's largest-element reduction without CuPy).
The best peer of a row is that of PEERS, measured on an H200 the same way, at its ratio there to cuDNN (paged: to cuDNN's
contiguous row). A row is held against cuDNN first, paged ones against our contiguous result. The same row over a float8 e4m3
cache, which has half of the bytes, is held against ours over its elements as bfloat16; compare its time with that "with lengths".
"few" are four query tokens instead of one. A launch of ours may begin while the one before it ends; "apart" are ours and the read
with a kernel of one element ahead of every launch, so that none does.
"""
import statistics
from typing import NamedTuple

import bulk_read

LAUNCHES, REPLAYS, QUICK_REPLAYS = 24, 15, 5
ROTATED = 512 << 20
TOLERANCE = 2e-2
FEW = 4                         # queries, as of a draft that is checked


class DecodeRow(NamedTuple):
    b: int
    s: int
    hq: int
    hk: int
    page: int = 0               # 0: contiguous

    @property
    def label(self):
        return f"bfloat16 {self.hq}/{self.hk} d 128 s {self.s} decode b {self.b}" + (f" page {self.page}" if self.page else "")

    @property
    def bytes(self):
        return 4 * self.b * self.hk * self.s * 128


_SIZES = ((1, 131072), (16, 8192), (64, 4096), (128, 2048))
ROWS = tuple(DecodeRow(b, s, hq, hk) for b, s in _SIZES for hq, hk in ((32, 8), (64, 8), (32, 1)))
ROWS += tuple(DecodeRow(b, s, 32, 8, page) for b, s in _SIZES[1:3] for page in (16, 64))

# Microseconds on an H200: cuDNN, and the fastest of cuDNN, FlashAttention-2, -3, flash-attn-4, FlashInfer and XQA.
PEERS = {
    (1, 131072, 32, 8, 0): (125.7, 125.7, "cuDNN"), (1, 131072, 64, 8, 0): (126.8, 126.8, "cuDNN"),
    (1, 131072, 32, 1, 0): (29.4, 29.4, "cuDNN"), (16, 8192, 32, 8, 0): (122.4, 122.1, "flash-attn-4"),
    (16, 8192, 64, 8, 0): (122.7, 122.0, "flash-attn-4"), (16, 8192, 32, 1, 0): (25.0, 25.0, "cuDNN"),
    (64, 4096, 32, 8, 0): (240.7, 240.7, "cuDNN"), (64, 4096, 64, 8, 0): (242.8, 242.8, "cuDNN"),
    (64, 4096, 32, 1, 0): (44.3, 41.2, "FlashAttention-3"), (128, 2048, 32, 8, 0): (241.2, 241.2, "cuDNN"),
    (128, 2048, 64, 8, 0): (243.1, 243.1, "cuDNN"), (128, 2048, 32, 1, 0): (36.3, 36.0, "flash-attn-4"),
    (16, 8192, 32, 8, 16): (122.4, 131.2, "FlashInfer"), (16, 8192, 32, 8, 64): (122.4, 128.2, "XQA"),
    (64, 4096, 32, 8, 16): (240.7, 249.1, "FlashInfer"), (64, 4096, 32, 8, 64): (240.7, 247.2, "FlashInfer"),
}


def replayed(calls, replays):
    """Median seconds of a launch, over replays of a graph of LAUNCHES or more; the calls follow each other."""
    import torch
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    launches = -(-LAUNCHES // len(calls)) * len(calls)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    kept = []                                           # results live as long as the graph writes them
    with torch.cuda.graph(graph, stream=stream):
        for n in range(launches):
            kept.append(calls[n % len(calls)]())
    times = []
    for n in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if n > 0:
            times.append(start.elapsed_time(end) / 1e3 / launches)
    return statistics.median(times)


def apart(calls):
    """The calls, each behind a kernel of one element: none begins ahead of the end of the one before it."""
    import torch
    one = torch.zeros(1, device="cuda")

    def behind(call):
        one.add_(1)
        return call()

    return [lambda call=call: behind(call) for call in calls]


def caches(row, stored="bfloat16"):
    """q, K and V of the sets that launches take in turn; [b, h, s, d]. stored: dtype of K and V."""
    import torch
    torch.manual_seed(0)
    shapes = (row.b, row.hq, 1, 128), (row.b, row.hk, row.s, 128), (row.b, row.hk, row.s, 128)
    dtypes = torch.bfloat16, *[getattr(torch, stored)] * 2
    count = max(2, -(-ROTATED * 2 // (row.bytes * dtypes[1].itemsize)))
    return [[torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_().to(dtype)
             for shape, dtype in zip(shapes, dtypes, strict=True)] for _ in range(count)]


def paged(row, k, v, table):
    """The same cache in pages [pages, hk, page, d], in the order of the table."""
    import torch
    cut = [x.view(row.b, row.hk, -1, row.page, 128).transpose(1, 2).reshape(-1, row.hk, row.page, 128) for x in (k, v)]
    pages = [torch.empty_like(x) for x in cut]
    for to, x in zip(pages, cut, strict=True):
        to[table.view(-1).long()] = x
    return pages


def ours(row, sets):
    """{what: calls} of this library."""
    import torch

    import flashgqa
    lens = torch.full((row.b,), row.s, device="cuda", dtype=torch.int32)
    if not row.page:
        few = torch.randn(row.b, row.hq, FEW, 128, device="cuda").to(sets[0][0])
        return {
            "flashgqa": [lambda x=x: flashgqa.attention(*x) for x in sets],
            "invariant": [lambda x=x: flashgqa.attention(*x, batch_invariant=True) for x in sets],
            "lengths": [lambda x=x: flashgqa.attention_with_kvcache(*x, cache_lens=lens) for x in sets],
            "few": [lambda x=x: flashgqa.attention(few, *x[1:]) for x in sets],
        }
    table = torch.randperm(row.b * row.s // row.page, device="cuda").to(torch.int32).view(row.b, -1)
    pages = [(q, *paged(row, k, v, table)) for q, k, v in sets]
    return {"flashgqa": [lambda x=x: flashgqa.attention_with_kvcache(*x, cache_lens=lens, page_table=table) for x in pages],
            "lengths": [lambda x=x: flashgqa.attention_with_kvcache(*x, cache_lens=lens) for x in sets]}


def over_float8(row):
    """The calls over float8 caches with a scale a head, and their relative difference from the same elements as bfloat16."""
    import torch

    import flashgqa
    sets = caches(row, "float8_e4m3fn")
    scale = torch.linspace(0.5, 2, row.hk, device="cuda")
    options = {"cache_lens": torch.full((row.b,), row.s, device="cuda", dtype=torch.int32), "k_scale": scale, "v_scale": scale}
    q, k, v = sets[0]
    wide = [(x.to(q) * scale[:, None, None]).to(q) for x in (k, v)]
    if row.page:
        options["page_table"] = torch.randperm(row.b * row.s // row.page, device="cuda").to(torch.int32).view(row.b, -1)
        bits = [(q, *paged(row, k.view(torch.int8), v.view(torch.int8), options["page_table"])) for q, k, v in sets]
        sets = [(q, *(x.view(torch.float8_e4m3fn) for x in pages)) for q, *pages in bits]
    calls = [lambda x=x: flashgqa.attention_with_kvcache(*x, **options) for x in sets]
    return calls, difference(calls[0](), flashgqa.attention(q, *wide))


def difference(got, want):
    got, want = got.float(), want.float()
    error = ((got - want).norm() / want.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"relative difference {error:.3g}; not timed")
    return error


def theirs(sets):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(backend, q, k, v):
        with sdpa_kernel(backend), torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    return {name: [lambda x=x, b=backend: call(b, *x) for x in sets] for name, backend in backends.items()}


def measure(row, replays):
    """The record of a row, times in microseconds."""
    import torch
    sets = caches(row)
    flat = [torch.randint(0, 9, (row.bytes // 4,), device="cuda", dtype=torch.int32) for _ in sets]
    own, others = ours(row, sets), theirs(sets)
    error = difference(own["flashgqa"][0](), (own["lengths"] if row.page else others["cudnn"])[0]())
    own["float8"], error_float8 = over_float8(row)
    bulk = bulk_read.calls(flat)
    calls = own | others | {"read": bulk or [x.amax for x in flat]}
    calls |= {"apart": apart(own["flashgqa"]), "read_apart": apart(calls["read"])}
    times = {f"{name}_us": 1e6 * replayed(some, replays) for name, some in calls.items()}
    record = dict(row._asdict(), difference=error, difference_float8=error_float8, **times)
    record["read_by"] = "bulk copies" if bulk else "torch.amax"
    cudnn_then, best_then, record["best_peer"] = PEERS[tuple(row)]
    record["best_us"] = record["cudnn_us"] * best_then / cudnn_then
    return record


def show(record, row):
    mine = record["flashgqa_us"]
    names = {"best": f"best ({record['best_peer']})", "cudnn": "cuDNN", "fa2": "FA2", "read": "read", "lengths": "with lengths",
             "invariant": "invariant", "few": f"{FEW} queries", "float8": "float8"}
    others = "   ".join(f"{text} {record[f'{name}_us']:.1f}" for name, text in names.items() if f"{name}_us" in record)
    others += f"   {mine - record['read_us']:.1f} over the read, apart {record['apart_us'] - record['read_apart_us']:.1f}"
    print(f"{row.label:50s} {mine:7.1f} us {row.bytes / mine / 1e6:5.2f} TB/s   {others}", flush=True)


def run(options):
    """Records of the rows that the options name."""
    import torch
    records = []
    for row in ROWS:
        if options.rows in row.label and "forward" in options.which and "bfloat16" in options.dtype:
            try:
                records.append(measure(row, QUICK_REPLAYS if options.quick else REPLAYS))
                show(records[-1], row)
            except (RuntimeError, NotImplementedError, ValueError) as error:       # the other rows, and the training ones, stand
                records.append(dict(row._asdict(), error=str(error)[:200]))
                print(f"{row.label}: {error}", flush=True)
            torch.cuda.empty_cache()
    return records
