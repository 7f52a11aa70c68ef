"""Code written for flash_attn, FlashAttention-3, xformers and torch's own attention runs after changing the import alone.

Each example is what the documentation of the original shows of a function, ending in out and in what it must be near to.
"""

import importlib

import pytest

torch = pytest.importorskip("torch")

from torch_tools import DEVICES, dense, near, on_devices, randn, seeded, seen, tables  # noqa: E402, F401

MODULES = {
    "flash_attn_interface": "flashgqa.torch.fa3",
    "flash_attn": "flashgqa.torch",
    "xformers.ops": "flashgqa.torch.xops",
    "torch.nn.functional": "flashgqa.torch",
}


def attend(q, k, v, causal=False, window=None, bias=None):
    """What flash_attn documents, by torch's softmax; bias of i + sk - sq - j."""
    sq, sk, left = q.shape[1], k.shape[1], -1 if window is None else window
    place = torch.arange(sk, device=q.device) - torch.arange(sk - sq, sk, device=q.device)[:, None]
    allowed = seen(sq, sk, causal, (left, -1), q.device)
    return dense(q, k, v, allowed, None if bias is None else bias(place))[0]


def turned(x, cos, sin):
    """Rotary embedding of [b, s, h, d] from position 0 on, first half with second."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


EXAMPLES = {
    "flash_attn_func": """
from flash_attn import flash_attn_func
q, k, v = make(2, 9, 4, 8), make(2, 9, 2, 8), make(2, 9, 2, 8)
out = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=True, window_size=(3, 0), deterministic=True)
expected = attend(q, k, v, True, 3)
""",
    "returned probabilities": """
from flash_attn.flash_attn_interface import flash_attn_func
q, k, v = make(2, 5, 4, 8), make(2, 9, 4, 8), make(2, 9, 4, 8)
out, softmax_lse, S_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
expected = attend(q, k, v)
assert softmax_lse.shape == (2, 4, 5)
""",
    "alibi": """
from flash_attn import flash_attn_func
q, k, v = make(2, 5, 4, 8), make(2, 9, 2, 8), make(2, 9, 2, 8)
slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
out = flash_attn_func(q, k, v, alibi_slopes=slopes)
expected = attend(q, k, v, bias=lambda place: -slopes[:, None, None] * place.abs())
""",
    "flash_attn_qkvpacked_func": """
from flash_attn import flash_attn_qkvpacked_func
qkv = make(2, 9, 3, 4, 8)
out = flash_attn_qkvpacked_func(qkv, 0.0, None, True)
expected = attend(*qkv.unbind(2), True)
""",
    "flash_attn_kvpacked_func": """
from flash_attn import flash_attn_kvpacked_func
q, kv = make(2, 5, 4, 8), make(2, 9, 2, 2, 8)
out = flash_attn_kvpacked_func(q, kv, causal=True)
expected = attend(q, *kv.unbind(2), True)
""",
    "flash_attn_varlen_func": """
from flash_attn import flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
q, k, v = make(2, 9, 4, 8), make(2, 9, 2, 8), make(2, 9, 2, 8)
attention_mask = (torch.arange(9) < torch.tensor([[9], [6]])).to(device)
q_unpad, indices, cu_seqlens_q, max_seqlen_q, seqused = unpad_input(q, attention_mask)
k_unpad, v_unpad = (index_first_axis(x.flatten(0, 1), indices) for x in (k, v))
out = flash_attn_varlen_func(
    q_unpad, k_unpad, v_unpad, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q, causal=True
)
out = pad_input(out, indices, 2, 9)
expected = attend(q, k, v, True) * attention_mask[:, :, None, None]
""",
    "flash_attn_varlen_qkvpacked_func": """
from flash_attn import flash_attn_varlen_qkvpacked_func
qkv, cu_seqlens = make(15, 3, 4, 8), torch.tensor([0, 9, 15], dtype=torch.int32, device=device)
out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 9, causal=True)
expected = torch.cat([attend(*x[None].unbind(2), True)[0] for x in qkv.split((9, 6))])
""",
    "flash_attn_varlen_kvpacked_func": """
from flash_attn import flash_attn_varlen_kvpacked_func
q, kv = make(8, 4, 8), make(15, 2, 2, 8)
cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5, 8], [0, 9, 15]))
out = flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 5, 9)
expected = torch.cat([attend(x[None], *y[None].unbind(2))[0] for x, y in zip(q.split((5, 3)), kv.split((9, 6)))])
""",
    "flash_attn_with_kvcache": """
from flash_attn import flash_attn_with_kvcache
q, k, v = make(2, 9, 4, 8), make(2, 9, 2, 8), make(2, 9, 2, 8)
cos, sin = tables(16, 8, q.dtype, device)
k_cache, v_cache = torch.zeros(2, 16, 2, 8, dtype=q.dtype, device=device), torch.zeros(2, 16, 2, 8, dtype=q.dtype, device=device)
cache_seqlens, steps = torch.zeros(2, dtype=torch.int32, device=device), []
with torch.no_grad():
    for start, end in ((0, 6), (6, 7), (7, 9)):
        part = [x[:, start:end] for x in (q, k, v)]
        steps.append(flash_attn_with_kvcache(
            part[0], k_cache, v_cache, part[1], part[2], rotary_cos=cos, rotary_sin=sin, cache_seqlens=cache_seqlens,
            causal=True, rotary_interleaved=False,
        ))
        cache_seqlens += end - start
out = torch.cat(steps, 1)
expected = attend(turned(q, cos, sin), turned(k, cos, sin), v, True)
""",
    "paged cache": """
from flash_attn import flash_attn_with_kvcache
q, k, v = make(2, 1, 4, 8), make(2, 24, 2, 8), make(2, 24, 2, 8)
block_table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32, device=device)
pages = [torch.zeros(6, 8, 2, 8, dtype=q.dtype, device=device) for _ in range(2)]
for page, x in zip(pages, (k, v)):
    page[block_table.flatten().long()] = x.detach().unflatten(1, (3, 8)).flatten(0, 1)
with torch.no_grad():
    out = flash_attn_with_kvcache(q, *pages, cache_seqlens=20, block_table=block_table)
expected = attend(q, k[:, :20], v[:, :20])
""",
    "rotary": """
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
x = make(2, 9, 4, 8)
cos, sin = tables(16, 8, x.dtype, device)
out, expected = apply_rotary_emb(x, cos, sin, interleaved=False), turned(x, cos, sin)
qkv = RotaryEmbedding(8, device=device)(torch.stack([x.detach()] * 3, 2))
assert torch.allclose(qkv[:, :, 1], expected, atol=1e-5) and torch.equal(qkv[:, :, 2], x)
""",
    "MHA": """
from flash_attn.modules.mha import MHA
layer = MHA(32, 4, num_heads_kv=2, causal=True, use_flash_attn=True, device=device, dtype=dtype)
x = make(2, 9, 32)
out = layer(x)
q, k, v = layer.Wqkv(x).unflatten(-1, (-1, 8)).split((4, 2, 2), 2)
expected = layer.out_proj(attend(q, k, v, True).flatten(2))
""",
    "FlashAttention-3": """
import flash_attn_interface
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
q, k, v = make(2, 9, 4, 8), make(2, 9, 2, 8), make(2, 9, 2, 8)
out = flash_attn_func(q, k, v, causal=True)
cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32, device=device)
packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens, 9, 9, causal=True)
expected = attend(q, k, v, True)
assert torch.allclose(packed, out.flatten(0, 1), atol=1e-4)
""",
    "FlashAttention-3's cache": """
from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata
q, k, v = make(2, 1, 4, 8), make(2, 16, 2, 8), make(2, 16, 2, 8)
cache_seqlens = torch.tensor([11, 11], dtype=torch.int32, device=device)
metadata = get_scheduler_metadata(2, 1, 16, 4, 2, 8, cache_seqlens, q.dtype, causal=True, num_splits=0)
with torch.no_grad():
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, causal=True, scheduler_metadata=metadata)
expected = attend(q, k[:, :11], v[:, :11], True)
""",
    "xformers": """
import xformers.ops as xops
from xformers.ops import LowerTriangularMask
q, k, v = make(2, 9, 4, 8), make(2, 9, 4, 8), make(2, 9, 4, 8)
out = xops.memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask(), p=0.0)
expected = attend(q, k, v, True)
""",
    "xformers' sequences": """
from xformers.ops import fmha
parts = [make(1, n, 4, 8) for n in (3, 9, 1)]
attn_bias, x = fmha.BlockDiagonalMask.from_tensor_list(parts)
out = torch.cat([y[0] for y in attn_bias.split(fmha.memory_efficient_attention(x, x, x, attn_bias=attn_bias.make_causal()))])
expected = torch.cat([attend(y, y, y, True)[0] for y in parts])
""",
    "scaled_dot_product_attention": """
from torch.nn.functional import scaled_dot_product_attention
q, k, v = make(2, 4, 9, 8), make(2, 2, 9, 8), make(2, 2, 9, 8)
out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
expected = attend(*(x.transpose(1, 2) for x in (q, k, v)), True).transpose(1, 2)
""",
}


def changed(code):
    """The code with the module of each import line replaced."""
    lines = []
    for line in code.splitlines():
        if line.startswith(("import ", "from ")):
            module = line.split()[1]
            name = next(name for name in MODULES if module == name or module.startswith(f"{name}."))
            line = line.replace(name, MODULES[name], 1)
        lines.append(line)
    return "\n".join(lines)


@on_devices
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(device, name):
    dtype, made = DEVICES[device][0], []

    def make(*shape):
        made.append(randn(*shape, dtype=dtype, device=device))
        return made[-1]

    space = dict(torch=torch, make=make, attend=attend, turned=turned, tables=tables, device=device, dtype=dtype)
    exec(changed(EXAMPLES[name]), space)
    out, expected = space["out"], space["expected"]
    near(out, expected, device)
    if out.requires_grad:
        cotangent = torch.randn_like(out)
        for a, b in zip(*(torch.autograd.grad(x, made, cotangent) for x in (out, expected)), strict=True):
            near(a, b, device)


def test_every_function_has_an_example():
    from flashgqa.torch import fa3, flash_attn_interface

    code = "".join(EXAMPLES.values())
    named = [*flash_attn_interface.__all__, *(name for name in vars(fa3) if name.startswith("flash_attn_"))]
    assert not [name for name in named if name not in code and name not in ("flash_attn_combine",)]


@pytest.mark.parametrize(
    "name", ["fa3", "bert_padding", "flash_attn_interface", "layers.rotary", "modules.mha", "xops", "xops.fmha.attn_bias"]
)
def test_a_star_brings_the_names_of_the_original_only(name):
    """Not those that the module itself imports."""
    module = importlib.import_module(f"flashgqa.torch.{name}")
    brought = {}
    exec(f"from flashgqa.torch.{name} import *", brought)
    brought.pop("__builtins__")
    defined = {n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__ and not n.startswith("_")}
    ours = {"Rule", "rule_of"}      # of attn_bias, for its neighbours
    assert brought and defined - ours <= brought.keys()
    assert not ({"torch", "attention", "bounds", "visible", "dataclass"} | ours) & brought.keys()
