"""The named rows that benchmarks run: one tuple a row, never edited into the runner."""
from typing import NamedTuple


class Row(NamedTuple):
    """Self-attention of s tokens, or with queries=1 one decode step over s cached keys."""
    dtype: str
    b: int
    hq: int
    hk: int
    s: int
    d: int
    causal: bool = False
    queries: int = 0            # 0: as many as keys

    @property
    def sq(self):
        return self.queries or self.s

    @property
    def label(self):
        kind = f"decode b {self.b}" if self.queries else "causal" if self.causal else "dense"
        return f"{self.dtype} {self.hq}/{self.hk} d {self.d} s {self.s} {kind}"


_HEADS = (
    (16, 16, 64, 512, False), (16, 16, 64, 512, True), (16, 16, 64, 2048, True),
    (32, 8, 128, 512, False), (32, 8, 128, 512, True), (32, 8, 128, 2048, False), (32, 8, 128, 2048, True),
    (32, 1, 128, 512, False), (32, 1, 128, 512, True), (32, 1, 128, 2048, False), (32, 1, 128, 2048, True),
)
_CACHES = tuple((b, s, hq, hk) for b, s in ((1, 16384), (8, 2048)) for hq, hk in ((32, 32), (32, 8), (32, 1)))
_DTYPES = ("float32", "bfloat16")

CPU_TRAIN = tuple(Row(t, 1, hq, hk, s, d, causal) for t in _DTYPES for hq, hk, d, s, causal in _HEADS)
CPU_DECODE = tuple(Row(t, b, hq, hk, s, 128, queries=1) for t in _DTYPES for b, s, hq, hk in _CACHES)

# 16,384 tokens a row, as training batches are made.
GPU_TRAIN = tuple(
    Row("bfloat16", 16384 // s, hq, hk, s, d, causal)
    for hq, hk, d in ((16, 16, 128), (32, 8, 128), (64, 8, 128), (32, 1, 128), (32, 8, 64), (16, 4, 256))
    for causal in (False, True) for s in (1024, 4096, 16384)
)
