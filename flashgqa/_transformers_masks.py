"""Masks of Hugging Face models as what they are made of: intervals, lengths and padding, in memory that grows with the length
of the sequence and not with its square.

transformers describes a mask by a function of (batch, head, query, key) made of its own few parts. `create` reads the parts;
a mask that has others, or that flashgqa has no option for, is transformers' own bool tensor [b, 1, sq, sk].
"""

import functools

import torch
from transformers import masking_utils

# Functions whose result is the same mask, whole or in part.
_SAME_MASK = frozenset(
    "__getitem__ bool clone contiguous cpu cuda detach expand expand_as permute repeat reshape to transpose unsqueeze".split()
)


def _refuse_use_on_scores(name, args, kwargs):
    """An error where a function of torch, one of whose arguments is a mask of ours, takes it for "eager"'s of 0 and -inf.

    BLOOM, MPT, XGLM and others compute their attention themselves, with such a mask. transformers refuses "sdpa" for them, but
    takes for granted that every model asks for an implementation that is registered.
    """
    if name in ("add", "add_", "__radd__", "__iadd__"):
        used = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
    else:
        used = name in ("masked_fill", "masked_fill_") and isinstance(kwargs.get("mask", *args[1:2]), BoolMask | IntervalMask)
    if used:
        raise NotImplementedError(
            "the model uses a bool attention_mask on its scores: it computes its attention itself and does not ask "
            'transformers\' AttentionInterface for it, so that attn_implementation="fgqa" cannot serve it; use "eager"'
        )


class BoolMask(torch.Tensor):
    """A bool mask, True = may attend, that is not used on scores by mistake."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", None)
        _refuse_use_on_scores(name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        same = name in _SAME_MASK and isinstance(result, torch.Tensor) and result.dtype == torch.bool
        return result.as_subclass(cls) if same else result

    def __deepcopy__(self, memo):
        return self.clone()


class IntervalMask:
    """A bool mask [b, 1, sq, sk] that is not in memory: the options of `flashgqa.torch.attention` that mean the same.

    Models hand it from layer to layer. Code that indexes or computes with it gets the tensor, made for that purpose.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(self, options, make, shape, device):
        self.options, self.make, self.shape, self.device = options, make, torch.Size(shape), device

    def dense(self):
        """The tensor that it stands for."""
        return self.make()

    def dim(self):
        return self.ndim

    def to(self, *args, **kwargs):
        """Itself on another device; the dense tensor in another dtype."""
        place = args[0] if args else kwargs.get("device", self.device)
        if kwargs.get("dtype", torch.bool) != torch.bool or len(args) > 1 or not isinstance(place, str | int | torch.device):
            return self.dense().to(*args, **kwargs)
        options = {n: x.to(place) if isinstance(x, torch.Tensor) else x for n, x in self.options.items()}
        return IntervalMask(options, lambda: self.make().to(place), self.shape, torch.device(place))

    def __getitem__(self, index):
        return self.dense()[index]

    def __getattr__(self, name):
        if name.startswith("__") or name == "make":     # "make": copying and unpickling ask before there is one
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def tensors(x):
            if isinstance(x, list | tuple):
                return type(x)(map(tensors, x))
            return x.dense() if isinstance(x, cls) else x

        _refuse_use_on_scores(getattr(func, "__name__", None), args, kwargs or {})
        return func(*map(tensors, args), **{name: tensors(x) for name, x in (kwargs or {}).items()})


for _name in ("and", "rand", "or", "ror", "xor", "rxor", "invert", "add", "radd", "sub", "rsub", "mul", "rmul", "eq", "ne"):
    # Python looks operators up in the class, past __getattr__.
    setattr(IntervalMask, f"__{_name}__", functools.partialmethod(
        lambda self, method, *other: getattr(self.dense(), method)(*other), f"__{_name}__"))  # fmt: skip
IntervalMask.__hash__ = object.__hash__


# ---- reading transformers' mask functions ----


def _any(*_):
    raise AssertionError("never called: only its maker's code is looked at")


@functools.cache
def _makers():
    """The code of each function that a public maker of transformers returns -> the maker's name.

    Two functions of one code differ only in what they close over, so that this recognises a part with certainty.
    """
    makers = {
        "and_masks": (_any,),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (1, None),
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (_any, None),
    }
    return {getattr(masking_utils, name)(*args).__code__: name for name, args in makers.items() if hasattr(masking_utils, name)}


class _Parts:
    """What a mask function is made of, to be combined by "and". Row i sees keys from i - left to i + right; None: no bound."""

    def __init__(self):
        self.left = self.right = self.chunk = self.chunk_start = self.packed = None
        self.positions = False

    def limit(self, left=None, right=None):
        self.left = left if self.left is None else self.left if left is None else min(left, self.left)
        self.right = right if self.right is None else self.right if right is None else min(right, self.right)


def _read(function, parts):
    """Adds function to parts; False if it is anything that flashgqa has no option for."""
    if function is masking_utils.causal_mask_function:
        parts.limit(right=0)
        return True
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return True
    code = getattr(function, "__code__", None)
    maker = _makers().get(code)
    if maker is None:
        return False
    given = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if maker == "and_masks":
        return all([_read(part, parts) for part in given["mask_functions"]])
    if maker == "sliding_window_overlay":
        parts.limit(left=given["sliding_window"] - 1)
    elif maker == "sliding_window_bidirectional_overlay":
        parts.limit(left=given["sliding_window"], right=given["sliding_window"])
    elif maker == "chunked_overlay":
        if parts.chunk is not None:
            return False
        parts.chunk, parts.chunk_start = given["chunk_size"], given["left_padding"]
    elif maker == "packed_sequence_mask_function":
        parts.packed = given["packed_sequence_mask"]
    elif maker == "remap_positions_for_packed_sequence":
        # Positions inside of a packed sequence rise by one: windows in positions are windows in rows. Chunks are not.
        parts.positions = True
        return _read(given["mask_function"], parts)
    return True


def _read_flags(parts, config, local_size, allow_is_causal_skip, allow_is_bidirectional_skip):
    """`_read` for torch.compile, which does not show what a function closes over: the flags by which transformers tells its
    own sdpa_mask that there is nothing but causality, or nothing at all, and a window or chunk of local_size.
    """
    if not allow_is_causal_skip and not allow_is_bidirectional_skip:
        return False
    if local_size is not None:
        window = getattr(config, "sliding_window", None) == local_size
        if window == (getattr(config, "attention_chunk_size", None) == local_size):
            return False
        if window and allow_is_causal_skip:
            parts.limit(left=local_size - 1)
        elif window:
            parts.limit(left=local_size, right=local_size)
        else:
            parts.chunk = local_size
    if allow_is_causal_skip:
        parts.limit(right=0)
    return True


# ---- their place among the keys ----


def _padding(attention_mask, kv_length, kv_offset):
    """[b, sk], True = a token: attention_mask [b, tokens so far] at the keys that there are."""
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _cu_seqlens(packed):
    """int32 [sequences + 1] of the rows of a batch one after the other, from the number [b, s] of each token's sequence."""
    starts = torch.ones_like(packed, dtype=torch.bool)
    starts[:, 1:] = packed[:, 1:] != packed[:, :-1]
    starts = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=packed.numel()).to(torch.int32)


def create(
    batch_size,
    q_length=None,
    kv_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    config=None,
    device=None,
    cache_position=None,
    **others,
):
    """The mask function that `register` puts into transformers' AttentionMaskInterface.

    Returns None where every row sees every key, a `BoolMask` [b, 1, sq, sk] with stride 0 in sq where only padding counts, an
    `IntervalMask`, or a `BoolMask` for what is none of these; a plain bool tensor in and for compiled code. That a causal mask is
    needed is never left to be guessed from the layer, as "sdpa" does: not every model's layers say it rightly.
    """
    if isinstance(attention_mask, IntervalMask):        # generate() makes masks in advance, and the model hands them in again
        return attention_mask
    here = dict(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
        config=config, **others,
    )  # fmt: skip
    if cache_position is not None:                      # transformers 4
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
        here["cache_position"] = cache_position
    else:
        device = torch.device("cpu" if device is None else device)
        here |= dict(q_length=q_length, q_offset=q_offset, device=device)

    compiling = torch.compiler.is_compiling()
    # A step of a compiled generate() has its mask made before, and takes tensors.
    step = not allow_is_causal_skip and q_length == 1

    def guarded(mask):
        return mask if compiling or step else mask.as_subclass(BoolMask)

    def fallback():
        return guarded(masking_utils.sdpa_mask(**here))

    parts = _Parts()
    known = (
        _read_flags(parts, config, local_size, allow_is_causal_skip, allow_is_bidirectional_skip)
        if compiling
        else _read(mask_function, parts)
    )
    if not known or isinstance(kv_offset, torch.Tensor):
        return fallback()
    if isinstance(q_offset, torch.Tensor) and not compiling and device.type == "cpu":
        q_offset = int(q_offset)
    first = q_offset - kv_offset                        # the key at which row 0 is
    fixed = not isinstance(first, torch.Tensor)
    if fixed and parts.left is not None and parts.left >= first + q_length - 1:
        parts.left = None                               # a window that reaches back to the first key from every row
    if fixed and parts.right is not None and parts.right >= kv_length - 1 - first:
        parts.right = None                              # row 0 sees the last key
    causal = parts.right == 0
    local = parts.left is not None or parts.right is not None or parts.chunk is not None
    shape = (batch_size, 1, q_length, kv_length)

    padding = None
    if attention_mask is not None:
        padding = _padding(attention_mask, kv_length, kv_offset)
        # Keys after the last row are hidden by causality; they are the unused rest of a static cache.
        if not compiling and (padding[:, : first + q_length] if fixed and causal else padding).all():
            padding = None
    if not causal and not local and parts.packed is None:
        if padding is not None:
            return guarded(padding[:, None, None, :].expand(shape))
        return None if allow_is_bidirectional_skip or allow_is_causal_skip else fallback()

    options = dict(causal=causal, window=None if parts.left is None and parts.right in (None, 0) else (parts.left, parts.right))
    if parts.chunk is not None:
        started = parts.chunk_start is not None and not compiling and parts.chunk_start.any()
        unknown = compiling and attention_mask is not None
        if started or unknown or parts.packed is not None or kv_offset % parts.chunk != 0:
            return fallback()
        options["chunk"] = parts.chunk
    if parts.packed is not None:
        if padding is not None or first != 0 or q_length != kv_length:
            return fallback()
        cu_seqlens = _cu_seqlens(parts.packed.expand(batch_size, -1))
        options |= dict(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    elif fixed and first == kv_length - q_length:
        options["align"] = "bottom-right"
    elif fixed and first == 0:
        options["align"] = "top-left"
    elif causal:
        # The row at the end of each sequence is its last one; keys from there on are not yet written.
        last = first + q_length
        if fixed and not 0 <= last <= kv_length:
            return fallback()
        if fixed:
            options["kv_lens"] = torch.full((batch_size,), last, dtype=torch.int32, device=device)
        else:
            options["kv_lens"] = last.to(torch.int32).reshape(1).expand(batch_size).contiguous()
    else:
        return fallback()
    if step:
        return fallback()
    if padding is not None:
        options["mask"] = padding[:, None, None, :]
    return IntervalMask(options, fallback, shape, device)
