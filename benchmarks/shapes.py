"""The named rows that benchmarks run: one tuple a row, never edited into the runner."""
import random
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
_GPU_HEADS = ((16, 16, 128), (32, 8, 128), (64, 8, 128), (32, 1, 128), (32, 8, 64), (16, 4, 256))
_BOTH = (False, True)
GPU_TRAIN = tuple(
    Row("bfloat16", 16384 // s, hq, hk, s, d, causal)
    for hq, hk, d in _GPU_HEADS for causal in _BOTH for s in (1024, 4096, 16384)
)


class GpuRow(NamedTuple):
    """What GPU_TRAIN does not show: one setting that differs from its rows, which `kind` names."""
    kind: str
    dtype: str
    b: int
    hq: int
    hk: int
    s: int                      # keys of a sequence; of packed ones the longest
    d: int
    causal: bool = False
    queries: int = 0            # 0: as many as keys
    window: int = 0             # keys that a row sees, its own included; 0: all
    page: int = 0               # slots of a page of the KV cache that keys and values lie in; 0: they do not
    lengths: tuple = ()         # of packed sequences
    launches: int = 1           # back to back
    passes: tuple = ("forward", "backward")

    @property
    def sq(self):
        return self.queries or self.s

    @property
    def label(self):
        mask, page = "causal" if self.causal else "dense", f" page {self.page}" if self.page else ""
        return f"{self.dtype} {self.hq}/{self.hk} d {self.d} s {self.s} {mask} {self.kind}{page}"


def _packed(shortest, longest, total=65536):
    """Lengths of a packed batch, evenly spread on a logarithmic scale."""
    draw, lengths = random.Random(0), []
    while sum(lengths) < total:
        lengths.append(int(shortest * (longest / shortest) ** draw.random()))
    lengths[-1] -= sum(lengths) - total
    return tuple(n for n in lengths if n > 0)


_PACKED = _packed(16, 4096)
_EVEN = sum(n * n for n in _PACKED) // sum(_PACKED)       # so long are the sequences of a batch of equal ones with the same FLOPs
GPU_MORE = (
    *(GpuRow("sustained", "bfloat16", 16384 // s, hq, hk, s, d, causal, launches=10, passes=("forward",))
      for hq, hk, d in _GPU_HEADS for s in (4096, 16384) for causal in _BOTH),
    *(GpuRow("sustained", "bfloat16", 16384 // s, 32, 8, s, 128, causal, launches=10, passes=("backward",))
      for s in (4096, 16384) for causal in _BOTH),
    *(GpuRow("any order", "bfloat16", 16384 // s, hq, hk, s, d, causal, passes=("backward",))
      for hq, hk, d in _GPU_HEADS for s in (1024, 4096, 16384) for causal in _BOTH),
    *(GpuRow("float16", "float16", 4, hq, hk, 4096, d, causal) for hq, hk, d in ((32, 8, 128), (32, 8, 64), (16, 4, 256))
      for causal in _BOTH),
    *(GpuRow("packed", "bfloat16", len(_PACKED), hq, hk, max(_PACKED), 128, causal, lengths=_PACKED)
      for hq, hk in ((32, 8), (32, 32)) for causal in _BOTH),
    *(GpuRow("even", "bfloat16", sum(_PACKED) // _EVEN, hq, hk, _EVEN, 128, causal, passes=("forward",))
      for hq, hk in ((32, 8), (32, 32)) for causal in _BOTH),
    GpuRow("window", "bfloat16", 1, 32, 8, 16384, 128, True, window=1024),
    GpuRow("prefill", "bfloat16", 4, 32, 8, 32768, 128, True, queries=128, passes=("forward",)),
    GpuRow("few tiles", "bfloat16", 1, 32, 8, 32768, 128, True, queries=128, passes=("forward",)),
    *(GpuRow("cached", "bfloat16", 4, 32, 8, 8192, 128, True, queries=512, page=page, passes=("forward",))
      for page in (8192, 64, 16)),
)

# Short sequences, forward; as many tokens as a training batch has, or few.
_SHORT = (16, 32, 64, 77, 128, 197, 256)        # a prompt of CLIP has 77 tokens, an image of a ViT 197
_MIXED = tuple((f"packed {least} to {most}", _packed(least, most)) for least, most in ((8, 128), (16, 256), (64, 512)))
GPU_SHORT = (
    *(GpuRow("short", "bfloat16", tokens // s, 12, 12, s, 64, causal, passes=("forward",))
      for tokens in (65536, 4096) for s in _SHORT for causal in _BOTH),
    *(GpuRow("short", "bfloat16", 65536 // s, 32, 8, s, 128, passes=("forward",)) for s in (16, 32, 64, 128, 256, 512)),
    *(GpuRow(kind, "bfloat16", len(lengths), hq, hk, max(lengths), d, causal, lengths=lengths, passes=("forward",))
      for kind, lengths in _MIXED for hq, hk, d in ((12, 12, 64), (32, 8, 128)) for causal in _BOTH),
)


class OptionRow(NamedTuple):
    """Self-attention with options that change more than an interval of keys; gpu_options.py says what their names stand for."""
    what: tuple
    hq: int
    hk: int
    d: int
    s: int = 4096
    b: int = 4
    dtype: str = "bfloat16"
    causal: bool = False

    @property
    def sq(self):
        return self.s

    @property
    def compared(self):
        """Whether peers do it, too. cuDNN takes two to four seconds to build each kind of kernel: a run has no time for all."""
        alone = self.what == ("dropout",) or "dropout" not in self.what
        return self.d <= 128 and self.s == 4096 and self.what != () and alone

    @property
    def passes(self):
        return ("backward",) if "its gradient" in self.what else ("forward", "backward")

    @property
    def name(self):
        return " + ".join(self.what) or "none"

    @property
    def label(self):
        return f"{self.dtype} {self.hq}/{self.hk} d {self.d} s {self.s} with {self.name}"


_OPTIONS = (
    ("softcap",), ("ALiBi",), ("mask",), ("padding",), ("bias",), ("bias", "its gradient"), ("float32 bias",), ("dropout",),
    ("softcap", "ALiBi"), ("softcap", "mask"), ("softcap", "bias"), ("softcap", "dropout"), ("ALiBi", "mask"), ("ALiBi", "bias"),
    ("ALiBi", "dropout"), ("mask", "bias"), ("mask", "dropout"), ("bias", "dropout"), ("bias", "dropout", "its gradient"),
)
_HEADS_OF_OPTIONS = ((32, 8, 64), (32, 8, 128), (16, 4, 256))
# 4,090 keys: rows of a mask or a bias of 16 bits that do not begin on 16 bytes.
GPU_OPTIONS = tuple(
    OptionRow(what, *heads, s) for heads in _HEADS_OF_OPTIONS
    for s, some in ((4096, ((), *_OPTIONS)), (4090, ((), ("mask",), ("bias",)))) for what in some
)
