"""Decode through attention_with_kvcache: one token appended and attended to, contiguous, paged and float8 caches.

The peer is PyTorch as its users decode: the new token copied into preallocated tensors, then scaled_dot_product_attention over
all of them, which are contiguous and of q's dtype in every row; it has neither pages nor float8 there. GB/s count each cached
byte once, and the share is of the rate at which the same run reads memory.
"""
import json
import time
from pathlib import Path
from typing import NamedTuple

RESULT = Path(__file__).resolve().parent / "results" / "kvcache.json"


class CacheRow(NamedTuple):
    dtype: str
    cache: str      # "contiguous", "page 16", "float8", ...
    b: int
    s: int          # slots, the new token's included
    hq: int
    hk: int
    d: int = 128

    @property
    def label(self):
        return f"{self.dtype} {self.cache} {self.hq}/{self.hk} d {self.d} s {self.s} b {self.b}"


ROWS = tuple(
    CacheRow(dtype, cache, b, s, hq, hk)
    for dtype in ("float32", "bfloat16") for b, s in ((1, 16384), (8, 2048)) for hq, hk in ((32, 8), (32, 1))
    for cache in ("contiguous", "page 64", "page 16", *(("float8",) if dtype == "bfloat16" else ()))
)


def paged(torch, x, page_size, table):
    """[b, hk, s, d] as pages in the order of the table."""
    b, hk, s, d = x.shape
    pages = torch.empty(b * s // page_size, hk, page_size, d, dtype=x.dtype)
    pages[table.flatten().long()] = x.reshape(b, hk, -1, page_size, d).transpose(1, 2).reshape(-1, hk, page_size, d)
    return pages


def contestants(torch, flashgqa, row):
    """(ours, theirs, bytes of the cache): two calls that return out."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, row.dtype)

    def normal(h, s):
        return torch.randn(row.b, h, s, row.d, generator=generator).to(dtype)

    q, k, v, k_new, v_new = normal(row.hq, 1), *(normal(row.hk, row.s) for _ in range(2)), *(normal(row.hk, 1) for _ in range(2))
    options = {"cache_lens": torch.full((row.b,), row.s - 1, dtype=torch.int32), "causal": True}
    if row.cache == "float8":
        options |= {name: torch.full((row.hk,), 0.02) for name in ("k_scale", "v_scale")}
        caches = [(x / 0.02).to(torch.float8_e4m3fn) for x in (k, v)]
        k, v = ((x.float() * 0.02).to(dtype) for x in caches)
    elif row.cache.startswith("page"):
        page_size = int(row.cache.split()[1])
        table = torch.randperm(row.b * row.s // page_size, generator=generator).to(torch.int32).reshape(row.b, -1)
        options["page_table"] = table
        caches = [paged(torch, x, page_size, table) for x in (k, v)]
    else:
        caches = [x.clone() for x in (k, v)]

    def ours():
        return flashgqa.attention_with_kvcache(q, *caches, k_new, v_new, **options)

    def theirs():
        with torch.no_grad():
            k[:, :, row.s - 1 :] = k_new
            v[:, :, row.s - 1 :] = v_new
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return ours, theirs, sum(x.nbytes for x in caches)


def run(options, ours, theirs, bench):
    """Called by bench.py, which has made the contestants' machine and knows ceilings and errors."""
    torch, limit = theirs.torch, bench.ceilings(theirs.torch)
    print(f"{ours.version} ({ours.module.show_config()['isa']}), {options.threads} threads; read {limit['read_gbs']:.1f} GB/s")
    records = []
    for row in ROWS:
        if row.dtype not in options.dtype or options.rows not in row.label:
            continue
        mine, other, size = contestants(torch, ours.module, row)
        error = bench.relative_error(mine(), other())
        if not error < bench.TOLERANCE["bfloat16" if row.cache == "float8" else row.dtype] * (2 if row.cache == "float8" else 1):
            raise SystemExit(f"{row.label}: relative difference {error:.3g} to {theirs.version}; not timed")
        t, t_other, ratio = bench.alternate(mine, other, 0.5 if options.quick else 3.0)
        gbs = size / t / 1e9
        records.append(dict(row._asdict(), ms=t * 1e3, torch_ms=t_other * 1e3, ratio=ratio[0], ratio_quartiles=ratio[1:], gbs=gbs,
                            share=gbs / limit["read_gbs"], difference=error))
        print(f"{row.label:50s} {t * 1e3:8.3f} ms {gbs:6.1f} GB/s = {100 * gbs / limit['read_gbs']:3.0f}% of reading   "
              f"torch {t_other * 1e3:8.3f} ms   ratio {ratio[0]:6.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})", flush=True)
    machine = {"processor": bench.processor(), "threads": options.threads, "flashgqa": ours.version, "torch": theirs.version,
               "isa": ours.module.show_config()["isa"], "date": time.strftime("%Y-%m-%d"), "commit": bench.commit()}
    out = options.out or (RESULT if len(records) == len(ROWS) and not options.quick else None)
    if out:
        result = {"machine": machine, "ceilings": limit, "rows": records}
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("wrote", out)
