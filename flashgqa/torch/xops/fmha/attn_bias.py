"""xformers.ops.fmha.attn_bias: which keys a query sees, as objects. Those of xformers itself are understood, too: `rule_of` goes
by the name of the class and the attributes it has in xformers.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ....reference import visible

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
]

# ---- what an object means ----


class Rule(NamedTuple):
    """Options of `flashgqa.torch.attention`; rows and keys say how sequences lie in query and key, if there are several."""

    causal: bool = False
    align: str = "bottom-right"
    window: tuple | None = None
    bias: Any = None
    rows: Any = None
    keys: Any = None


def _of_window(bias):
    """The window of objects that have one; xformers counts a query's own key in _window_size."""
    if hasattr(bias, "window_left"):
        return bias.window_left, bias.window_right
    return (bias._window_size - 1, 0) if hasattr(bias, "_window_size") else None


TOP_LEFT, BOTTOM_RIGHT, UNALIGNED = (True, "top-left"), (True, "bottom-right"), (False, "bottom-right")
RULES = {
    "LowerTriangularMask": TOP_LEFT,
    "LowerTriangularMaskWithTensorBias": TOP_LEFT,
    "LowerTriangularFromBottomRightMask": BOTTOM_RIGHT,
    "LowerTriangularFromBottomRightLocalAttentionMask": BOTTOM_RIGHT,
    "LocalAttentionFromBottomRightMask": UNALIGNED,
    "BlockDiagonalMask": UNALIGNED,
    "BlockDiagonalCausalMask": TOP_LEFT,
    "BlockDiagonalCausalFromBottomRightMask": BOTTOM_RIGHT,
    "BlockDiagonalCausalLocalAttentionMask": TOP_LEFT,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": BOTTOM_RIGHT,
    "BlockDiagonalPaddedKeysMask": UNALIGNED,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": BOTTOM_RIGHT,
    "BlockDiagonalLocalAttentionPaddedKeysMask": UNALIGNED,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": BOTTOM_RIGHT,
    "BlockDiagonalGappyKeysMask": UNALIGNED,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": BOTTOM_RIGHT,
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": UNALIGNED,
}


def rule_of(bias):
    """The `Rule` of a tensor, of an object of this module, or of xformers' object of the same name."""
    name = type(bias).__name__
    if name in RULES:
        causal, align = RULES[name]
        rows, keys = getattr(bias, "q_seqinfo", None), getattr(bias, "k_seqinfo", None)
        return Rule(causal, align, _of_window(bias), getattr(bias, "_bias", None), rows, keys)
    if isinstance(bias, torch.Tensor):
        return Rule(bias=bias)
    raise NotImplementedError(f"attn_bias is {name}: it must be a tensor or one of {', '.join(RULES)}")


class AttentionBias:
    """Base of the objects below."""

    def to(self, device):
        return self

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """The mask as a tensor of shape [..., queries, keys], 0 or -inf: for tests, slow."""
        rule = rule_of(self)
        if rule.rows is None:
            allowed = _seen(*shape[-2:], rule)
        else:
            allowed = torch.zeros(shape[-2:], dtype=torch.bool)
            for (q0, q1), (k0, k1) in zip(rule.rows.intervals(), rule.keys.intervals(), strict=True):
                allowed[q0:q1, k0:k1] = _seen(q1 - q0, k1 - k0, rule)
        mask = torch.zeros(shape[-2:], dtype=dtype).masked_fill(~allowed, -torch.inf).to(device)
        return (mask if rule.bias is None else mask + rule.bias).expand(shape)


def _seen(queries, keys, rule):
    return torch.from_numpy(visible(queries, keys, causal=rule.causal, window=rule.window, align=rule.align))


# ---- one sequence ----


class LowerTriangularMask(AttentionBias):
    """Query i sees keys j <= i."""

    def __init__(self, device=None):
        pass

    def add_bias(self, bias):
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Query i sees keys j <= i, with a tensor added to the scores."""

    def __init__(self, bias):
        self._bias = bias

    def to(self, device):
        return type(self)(self._bias.to(device))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Query i sees keys j <= i + keys - queries."""

    def make_local_attention(self, window_size):
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Of those keys the last window_size."""

    _window_size: int

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError(f"window_size is {self._window_size}: it must be at least 1, a query's own key")


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Query i sees i + keys - queries - window_left <= j <= i + keys - queries + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self):
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError(f"window_left is {self.window_left}, window_right {self.window_right}: both must be at least 0")


# ---- several sequences, one after the other ----


def _tensor(numbers, device):
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def _usual(device):
    return device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class _SeqLenInfo:
    """Where sequences lie: seqstart int32 [sequences + 1], the same as a list, and the longest and shortest."""

    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        seqlens = [int(n) for n in seqlens]
        starts = [0, *accumulate(seqlens)]
        return cls(_tensor(starts, _usual(device)), max(seqlens, default=0), min(seqlens, default=0), starts)

    def intervals(self):
        return zip(self.seqstart_py[:-1], self.seqstart_py[1:], strict=True)

    def to(self, device):
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return type(self)(**{**vars(self), **tensors})

    def split(self, x, batch_sizes=None):
        if x.shape[:2] != (1, self.seqstart_py[-1]):
            raise ValueError(f"x is {list(x.shape)}: it must be [1, {self.seqstart_py[-1]}, ...]")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        ends = [0, *accumulate(sizes)]
        bounds = [self.seqstart_py[n] for n in ends]
        parts = x.split([b - a for a, b in zip(bounds, bounds[1:], strict=False)], 1)
        return [part.reshape(size, -1, *x.shape[2:]) for part, size in zip(parts, sizes, strict=True)]


@dataclass
class _PlacedSeqInfo(_SeqLenInfo):
    """Of each sequence's place only the first seqlen are used; seqlen_py is the same as a list."""

    seqlen: torch.Tensor
    seqlen_py: list

    @classmethod
    def placed(cls, starts, seqlens, device, **more):
        starts, seqlens = list(starts), list(seqlens)
        device = _usual(device)
        return cls(
            seqstart=_tensor(starts, device), max_seqlen=max(seqlens, default=0), min_seqlen=min(seqlens, default=0),
            seqstart_py=starts, seqlen=_tensor(seqlens, device), seqlen_py=seqlens, **more,
        )  # fmt: skip

    def intervals(self):
        return ((start, start + n) for start, n in zip(self.seqstart_py[:-1], self.seqlen_py, strict=True))

    def split(self, x, batch_sizes=None):
        raise NotImplementedError("keys with room between the sequences cannot be split")


@dataclass
class _PaddedSeqLenInfo(_PlacedSeqInfo):
    """All places have the same size, padding."""

    padding: int

    @classmethod
    def from_seqlens_padded(cls, seqlens, padding, *, device=None):
        if any(n > padding for n in seqlens):
            raise ValueError(f"kv_seqlen is {list(seqlens)} and kv_padding {padding}: no sequence may be longer than that")
        return cls.placed(range(0, len(seqlens) * padding + 1, padding), seqlens, device, padding=padding)


class _Sequences(AttentionBias):
    def _of(self, kind, **more):
        return kind(self.q_seqinfo, self.k_seqinfo, **more)

    def to(self, device):
        more = {name: x for name, x in vars(self).items() if name not in ("q_seqinfo", "k_seqinfo")}
        return type(self)(self.q_seqinfo.to(device), self.k_seqinfo.to(device), **more)


@dataclass
class BlockDiagonalMask(_Sequences):
    """Queries see all keys of their own sequence."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Any = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        if kv_seqlen is not None and len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"q_seqlen has {len(q_seqlen)} sequences and kv_seqlen {len(kv_seqlen)}: both must have as many")
        rows = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        same = kv_seqlen is None or list(kv_seqlen) == list(q_seqlen)
        return cls(rows, rows if same else _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors):
        """The bias for tensors [batch_n, length_n, ...], and all of them in one [1, total, ...]; `split` is the inverse."""
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])], device=tensors[0].device)
        bias._batch_sizes = [x.shape[0] for x in tensors]
        return bias, _one(tensors)

    @classmethod
    def from_tensor_lists_qkv(cls, tensors_q, tensors_k, tensors_v=None):
        lengths = [[x.shape[1] for x in tensors for _ in range(x.shape[0])] for tensors in (tensors_q, tensors_k)]
        bias = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        return bias, _one(tensors_q), _one(tensors_k), None if tensors_v is None else _one(tensors_v)

    def split_queries(self, tensor):
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor):
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor):
        return self.split_queries(tensor)

    def make_causal(self):
        return self._of(BlockDiagonalCausalMask, _batch_sizes=self._batch_sizes)

    def make_causal_from_bottomright(self):
        return self._of(BlockDiagonalCausalFromBottomRightMask, _batch_sizes=self._batch_sizes)

    def make_local_attention(self, window_size):
        return self._of(BlockDiagonalCausalLocalAttentionMask, _batch_sizes=self._batch_sizes, _window_size=window_size)

    def make_local_attention_from_bottomright(self, window_size):
        kind = BlockDiagonalCausalLocalAttentionFromBottomRightMask
        return self._of(kind, _batch_sizes=self._batch_sizes, _window_size=window_size)


def _one(tensors):
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Causal in each sequence, from its first query and key on."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Causal in each sequence, up to its last query and key."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Causal in each sequence, and the last _window_size keys of those."""

    _window_size: int = 0

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError(f"window_size is {self._window_size}: it must be at least 1, a query's own key")


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalLocalAttentionMask):
    """The same up to the last query and key."""


@dataclass
class BlockDiagonalPaddedKeysMask(_Sequences):
    """Queries see the keys of their own sequence, of which each has room for kv_padding and uses kv_seqlen."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None):
        rows = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(rows, _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device))

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, *window):
        rows = _SeqLenInfo.from_seqlens(q_seqlen)
        return cls(rows, _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding), *window)

    def make_local_attention(self, window_left, window_right):
        return self._of(BlockDiagonalLocalAttentionPaddedKeysMask, window_left=window_left, window_right=window_right)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal up to the last query and key of each sequence."""

    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """A window around the diagonal that ends at the last query and key of each sequence."""

    window_left: int
    window_right: int


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal up to the last query and key of each sequence, and the last _window_size keys of those."""

    _window_size: int


@dataclass
class BlockDiagonalGappyKeysMask(_Sequences):
    """Queries see the keys of their own sequence, which start at kv_seqstarts (one more than sequences) and are kv_seqlen."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PlacedSeqInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        if not len(q_seqlen) == len(kv_seqlen) == len(kv_seqstarts) - 1:
            raise ValueError(
                f"q_seqlen, kv_seqlen and kv_seqstarts have {len(q_seqlen)}, {len(kv_seqlen)} and {len(kv_seqstarts)} entries: "
                "the last must have one more than the others, which have as many"
            )
        rows = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(rows, _PlacedSeqInfo.placed(kv_seqstarts, kv_seqlen, device))

    def make_local_attention(self, window_left, window_right):
        kind = BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask
        return self._of(kind, window_left=window_left, window_right=window_right)


class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Causal up to the last query and key of each sequence."""


@dataclass
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    """A window around the diagonal that ends at the last query and key of each sequence."""

    window_left: int
    window_right: int
