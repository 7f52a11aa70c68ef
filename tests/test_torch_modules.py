"""Layers of flashgqa.torch: FlashGQA, FlashMHA, flash_attn's MHA, rotary embeddings, padding, pooled heads."""

import copy
import inspect
import pickle
import types

import ml_dtypes
import numpy
import pytest

import flashgqa

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch_tools import DEVICES, gradients, near, on_devices, randn, seeded, tables, turned  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402
from flashgqa.torch import bert_padding  # noqa: E402
from flashgqa.torch.layers import rotary  # noqa: E402
from flashgqa.torch.modules import mha  # noqa: E402


def make(device, *arguments, kind=fg.FlashGQA, **options):
    return kind(*arguments, device=device, dtype=DEVICES[device][0], **options)


def embed(device, *shape):
    return randn(*shape, dtype=DEVICES[device][0], device=device)


def expected_of(layer, x, x_kv=None, allowed=None, turn=lambda y: y):
    """What a layer computes, step by step, with torch's softmax."""
    q, k, v = (
        F.linear(y, w.weight, w.bias).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for w, y in ((layer.W_q, x), (layer.W_k, x if x_kv is None else x_kv), (layer.W_v, x if x_kv is None else x_kv))
    )
    q, k = turn(q), turn(k)
    k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / layer.head_dim**0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(-2), layer.W_o.weight, layer.W_o.bias), weights


# ---- FlashGQA ----


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@on_devices
def test_flash_gqa_and_its_weights(device, heads):
    layer, x = make(device, 48, *heads, causal=True, head_dim=8), embed(device, 2, 9, 48)
    allowed = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    expected, expected_weights = expected_of(layer, x, allowed=allowed)
    out, weights = layer(x, need_weights=True)
    near(out, expected, device)
    near(weights, expected_weights, device)
    near(layer(x), out, device)
    parameters = (x, *layer.parameters())
    for a, b in zip(gradients((out, weights), parameters), gradients((expected, expected_weights), parameters), strict=True):
        near(a, b, device)


@on_devices
def test_flash_gqa_masks(device):
    layer, x = make(device, 32, 4, 2), embed(device, 2, 9, 32)
    padding = torch.arange(9, device=device) < torch.tensor([[9], [6]], device=device)
    mask = torch.rand(2, 1, 9, 9, device=device) < 0.7
    mask[..., 0] = True
    near(layer(x, key_padding_mask=padding), expected_of(layer, x, allowed=padding[:, None, None])[0], device)
    near(layer(x, mask=mask, key_padding_mask=padding), expected_of(layer, x, allowed=mask & padding[:, None, None])[0], device)
    y = embed(device, 2, 5, 32)
    near(layer(x, y), expected_of(layer, x, y)[0], device)
    packed, cu_seqlens = torch.cat([x[0], x[1, :6]]), torch.tensor([0, 9, 15], dtype=torch.int32, device=device)
    out = layer(packed, cu_seqlens=cu_seqlens, max_seqlen=9)
    near(out[9:], layer(x, key_padding_mask=padding)[1, :6], device)


def test_flash_gqa_windows_softcap_scale_alibi():
    x = randn(2, 9, 32)
    layer = make("cpu", 32, 4, 2, causal=True, window=(3, 0), softcap=5.0, scale=0.2, alibi=True)
    q, k, v = (w(x).unflatten(-1, (-1, 8)) for w in (layer.W_q, layer.W_k, layer.W_v))
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    options = dict(causal=True, window=(3, 0), softcap=5.0, scale=0.2, alibi_slopes=slopes, layout="bshd")
    assert torch.equal(layer(x), layer.W_o(fg.attention(q, k, v, **options).flatten(-2)))
    assert mha.get_alibi_slopes(6) == [2.0 ** -(8 * n / 4) for n in range(1, 5)] + [2.0**-1, 2.0**-3]


def test_flash_gqa_weights_of_many_keys_and_none():
    layer = make("cpu", 16, 2, 1, window=(300, 10))
    _, weights = layer(randn(1, 520, 16), need_weights=True)
    assert weights.shape == (1, 2, 520, 520)
    near(weights.sum(-1), torch.ones(1, 2, 520))
    assert weights[0, 0, 400, :100].eq(0).all() and weights[0, 0, 400, 100] > 0 and weights[0, 0, 400, 411:].eq(0).all()
    out, weights = layer(randn(1, 0, 16), need_weights=True)
    assert out.shape == (1, 0, 16) and weights.shape == (1, 2, 0, 0)


@pytest.mark.parametrize("options", [{}, dict(rotary_dim=8), dict(rotary_dim=4, rotary_interleaved=True, window=(4, 0))], ids=str)
@on_devices
def test_flash_gqa_cache_is_the_whole_sequence_piece_by_piece(device, options):
    layer, x = make(device, 32, 4, 2, causal=True, **options).eval(), embed(device, 2, 11, 32)
    cache = layer.new_cache(2, 12)
    with torch.no_grad():
        whole = layer(x)
        for _ in range(2):
            pieces = [layer(x[:, start:end], cache=cache) for start, end in ((0, 5), (5, 6), (6, 7), (7, 11))]
            near(torch.cat(pieces, 1), whole, device)
            assert cache.length == 11
            with pytest.raises(ValueError, match="holds 11 of 12 positions"):
                layer(x[:, :2], cache=cache)
            assert cache.length == 11
            cache.reset()
        layer(x[:, :5], cache=cache)
        for wrong in (dict(key_padding_mask=torch.ones(2, 5, dtype=torch.bool)), dict(mask=torch.ones(2, 1, 6, 7))):
            with pytest.raises((TypeError, ValueError), match="mask"):
                layer(x[:, 5:6], cache=cache, **wrong)
            assert cache.length == 5
        cache.reset()
    with pytest.raises(RuntimeError, match="inference"):
        layer(x, cache=cache)


def test_flash_gqa_and_a_paged_cache():
    """Two prompts of different lengths, then tokens; a beam that goes on from the other sequence."""
    layer, x = make("cpu", 32, 4, 2, causal=True, rotary_dim=8, window=(6, 0)).eval(), randn(2, 11, 32, grad=False)
    cache = flashgqa.KVCache(2, 2, 8, capacity=16, page_size=4, dtype="float64", layout="bshd", library="torch")
    with torch.no_grad():
        whole = layer(x)
        near(layer(x[:, :5], cache=cache), whole[:, :5])
        cache.crop([5, 3])
        step = layer(torch.stack([x[0, 5:6], x[1, 3:4]]), cache=cache)
        near(step[:, 0], torch.stack([whole[0, 5], whole[1, 3]]))
        cache.reorder([0, 0])
        near(layer(x[:1, 6:8].expand(2, 2, 32), cache=cache), whole[:1, 6:8].expand(2, 2, 32))
        for options in (dict(need_weights=True), dict(mask=torch.ones(2, 1, 1, 3, dtype=torch.bool))):
            with pytest.raises(ValueError, match="KVCache"):
                layer(x[:, :3], cache=cache, **options)
        with pytest.raises(ValueError, match="bshd"):
            layer(x[:, :3], cache=flashgqa.KVCache(2, 2, 8, capacity=16, dtype="float64", library="torch"))
    with pytest.raises(RuntimeError, match="inference"):
        layer(x[:, :3], cache=cache)


def test_flash_gqa_dropout_training_and_compile():
    layer, x = make("cpu", 32, 4, 2, dropout=0.4, rotary_dim=8, causal=True), randn(2, 9, 32, grad=False)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    assert "num_kv_heads=2" in repr(layer)


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda **where: fg.FlashGQA(32, 4, 2, causal=True, rotary_dim=8, rotary_scale_base=64, alibi=True, **where),
        lambda **where: mha.MHA(
            32, 4, causal=True, rotary_emb_dim=8, rotary_emb_scale_base=64, use_alibi=True, use_flash_attn=True, **where
        ),
    ],
    ids=["FlashGQA", "MHA"],
)
def test_layers_that_turn(make_layer):
    """Training while compiled and before and after inference; layers of large models, which begin without memory."""
    layer, x = make_layer(), randn(2, 9, 32, dtype=torch.float32, grad=False)
    compiled, expected = torch.compile(layer, backend="aot_eager", fullgraph=True), layer(x)
    for _ in range(3):
        out = compiled(x)
        assert torch.equal(out, expected)
        out.sum().backward()
    fresh = make_layer()
    with torch.inference_mode():
        fresh(x)
    fresh(x).sum().backward()
    for twin in (make_layer(device="meta"), make_layer(device="meta").half()):
        twin = twin.to_empty(device="cpu").float()
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("scale_base", [None, 64])
def test_compiled_layers_keep_no_tables(scale_base):
    """In a CUDA graph they would lie in memory that the next call writes: torch refuses to read them again."""
    x = randn(2, 9, 32, dtype=torch.float32, grad=False)
    for layer in (fg.FlashGQA(32, 4, 2, rotary_dim=8, rotary_scale_base=scale_base),
                  mha.MHA(32, 4, rotary_emb_dim=8, rotary_emb_scale_base=scale_base, use_flash_attn=True)):  # fmt: skip
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        outs = [compiled(x[:, :length]) for length in (9, 5, 9)]
        rotary = layer.rotary if isinstance(layer, fg.FlashGQA) else layer.rotary_emb
        assert rotary._cos_cached is rotary._cos_k_cached is None and rotary._seq_len_cached == 0
        for out in outs if scale_base is None else outs[:1]:     # xPos: tables for other lengths are others
            assert torch.equal(out, layer(x[:, : out.shape[1]]))


def test_flash_gqa_errors():
    layer, x = make("cpu", 32, 4, 2, rotary_dim=8), randn(2, 9, 32)
    for arguments, options in (((30, 4), {}), ((32, 4, 3), {}), ((32, 0), {})):
        with pytest.raises(ValueError, match="multiple"):
            fg.FlashGQA(*arguments, **options)
    for options in (dict(rotary_dim=3), dict(rotary_dim=10)):
        with pytest.raises(ValueError, match="rotary_dim"):
            fg.FlashGQA(32, 4, **options)
    with pytest.raises(ValueError, match="dropout"):
        fg.FlashGQA(32, 4, dropout=1.5)
    with pytest.raises(ValueError, match="head_dim is 0"):
        fg.FlashGQA(32, 4, head_dim=0)
    with pytest.raises(TypeError, match="source is Linear: it must be a torch.nn.MultiheadAttention"):
        fg.FlashGQA.from_multihead_attention(torch.nn.Linear(2, 2))
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    for options in (dict(x_kv=x), dict(key_padding_mask=torch.ones(2, 9, dtype=torch.bool)), dict(cache=layer.new_cache(2, 9))):
        with pytest.raises(ValueError, match="cu_seqlens"):
            layer(x[0], cu_seqlens=cu_seqlens, max_seqlen=9, **options)
    with pytest.raises(ValueError, match="x_kv is given: rotary"):
        layer(x, x)
    for wrong, options in ((x[0], {}), (x[..., :16], {}), (x, dict(cu_seqlens=cu_seqlens, max_seqlen=9))):
        with pytest.raises(ValueError, match=r"x is \[.*\]: it must be \[batch, seq, embed_dim\] with embed_dim 32"):
            layer(wrong, **options)
    with pytest.raises(ValueError, match=r"x_kv is \[2, 9, 16\]: it must"):
        make("cpu", 32, 4)(x, x[..., :16])
    for wrong in (None, x.detach().numpy(), [x]):
        with pytest.raises(TypeError, match=rf"x is {type(wrong).__name__}: it must be a torch.Tensor"):
            layer(wrong)
    with pytest.raises(ValueError, match="need_weights"):
        layer(x[0], cu_seqlens=cu_seqlens, max_seqlen=9, need_weights=True)
    with pytest.raises(ValueError, match="key_padding_mask"):
        layer(x, key_padding_mask=torch.ones(2, 8, dtype=torch.bool))


# ---- other libraries' state dicts and names ----


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_there_and_back(bias):
    theirs = torch.nn.MultiheadAttention(24, 4, bias=bias, dropout=0.1, batch_first=True, dtype=torch.float64).eval()
    x, y = randn(2, 9, 24), randn(2, 5, 24)
    padding = torch.arange(5) < torch.tensor([[5], [3]])
    expected, expected_weights = theirs(x, y, y, key_padding_mask=~padding, average_attn_weights=False)
    for kind in (fg.FlashGQA, fg.FlashMHA):
        layer = kind.from_multihead_attention(theirs)
        assert type(layer) is kind and layer.dropout_p == 0.1 and not layer.training
        out, weights = layer(x, y, key_padding_mask=padding, need_weights=True)
        near(out, expected)
        near(weights, expected_weights)
        back = layer.to_multihead_attention()
        assert back.state_dict().keys() == theirs.state_dict().keys()
        assert torch.equal(back(x, y, y)[0], theirs(x, y, y)[0])
    near(fg.FlashGQA.from_multihead_attention(theirs, 2)(x, y), fg.mean_pool_kv_heads(layer, 2)(x, y))
    # A whole model's state dict, of a layer within.
    model = torch.nn.ModuleDict({"a": make("cpu", 24, 4, bias=bias)})
    model.load_state_dict({f"a.{name}": x for name, x in theirs.state_dict().items()})
    near(model["a"].eval()(x, y, key_padding_mask=padding), expected)
    with pytest.raises(NotImplementedError, match="kdim"):
        fg.FlashGQA.from_multihead_attention(torch.nn.MultiheadAttention(24, 4, kdim=12))
    with pytest.raises(NotImplementedError, match="as many KV heads"):
        make("cpu", 24, 4, 2).to_multihead_attention()


MHA_SIGNATURE = "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, dropout=0.0, \
softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, rotary_emb_base=10000.0, \
rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1), fused_bias_fc=False, \
use_flash_attn=False, return_residual=False, checkpointing=False, device=None, dtype=None"


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=True, window_size=(3, -1)), dict(rotary_emb_dim=8, rotary_emb_interleaved=True), dict(use_alibi=True)],
    ids=str,
)
@on_devices
def test_flash_attns_mha(device, heads, options):
    assert str(inspect.signature(mha.MHA)) == f"({MHA_SIGNATURE})"
    theirs = make(device, 32, 4, heads, kind=mha.MHA, use_flash_attn=True, **options)
    names = [f"{name}.{kind}" for name in ("Wqkv", "out_proj") for kind in ("weight", "bias")]
    assert list(theirs.state_dict()) == names and theirs.Wqkv.weight.shape == (32 + 16 * heads, 32)
    own = make(device, 32, 4, kind=fg.FlashMHA, num_heads_kv=heads, use_flash_attn=True, **options)
    own.load_state_dict(theirs.state_dict())
    x = embed(device, 2, 9, 32)
    out, expected = theirs(x), own(x)
    near(out, expected, device)
    near(gradients((out,), (x,))[0], gradients((expected,), (x,))[0], device)
    checkpointed = make(device, 32, 4, heads, kind=mha.MHA, checkpointing=True, return_residual=True, **options)
    checkpointed.load_state_dict(theirs.state_dict())
    again, residual = checkpointed(x)
    assert residual is x
    near(again, out, device)
    once, twice = gradients((theirs(x),), (theirs.Wqkv.weight,)), gradients((again,), (checkpointed.Wqkv.weight,))
    near(twice, once, device)


@on_devices
def test_flash_attns_mha_in_generation(device):
    layer = make(device, 32, 4, 2, kind=mha.MHA, causal=True, rotary_emb_dim=8, layer_idx=3, use_flash_attn=True)
    x = embed(device, 2, 9, 32)
    params = types.SimpleNamespace(
        max_seqlen=10, max_batch_size=3, seqlen_offset=0, batch_size_offset=0, key_value_memory_dict={}, lengths_per_sample=None
    )
    with torch.no_grad():
        whole, pieces = layer(x), []
        for start, end in ((0, 6), (6, 7), (7, 9)):
            params.seqlen_offset = start
            pieces.append(layer(x[:, start:end], inference_params=params))
    near(torch.cat(pieces, 1), whole, device)
    assert params.key_value_memory_dict[3].shape == (3, 10, 2, 2, 8)
    with pytest.raises(ValueError, match="positions"), torch.no_grad():
        layer(x, inference_params=params)
    # Sequences of different lengths, after a prompt.
    params.seqlen_offset, params.lengths_per_sample, params.key_value_memory_dict = 0, torch.tensor([0, 0], device=device), {}
    with torch.no_grad():
        layer(x[:, :6], inference_params=params)
        params.seqlen_offset, params.lengths_per_sample = 6, torch.tensor([6, 4], device=device)
        step = layer(torch.stack([x[0, 6:7], x[1, 4:5]]), inference_params=params)
    near(step[:, 0], torch.stack([whole[0, 6], whole[1, 4]]), device)
    # The same in the last rows of a larger cache.
    larger = types.SimpleNamespace(**{**vars(params), "batch_size_offset": 1})
    larger.lengths_per_sample = torch.tensor([9, 6, 4], device=device)
    memory = params.key_value_memory_dict[3].roll(1, 0)
    memory[0] = 7
    larger.key_value_memory_dict = {3: memory}
    with torch.no_grad():
        again = layer(torch.stack([x[0, 6:7], x[1, 4:5]]), inference_params=larger)
        assert torch.equal(again, step) and memory[0].eq(7).all()
        larger.batch_size_offset = 2
        with pytest.raises(ValueError, match="batch 2 to 4 is not in a cache"):
            layer(x[:, :1], inference_params=larger)
    params.seqlen_offset, params.lengths_per_sample = 9, None
    plain = make(device, 32, 4, 2, kind=mha.MHA, layer_idx=3)
    with pytest.raises(ValueError, match="does not fit"), torch.no_grad():
        plain(x, inference_params=params)


def test_flash_attns_mha_cross_packed_and_convolved():
    x, y = randn(2, 9, 32), randn(2, 5, 32)
    cross = make("cpu", 32, 4, 2, kind=mha.MHA, cross_attn=True)
    own = make("cpu", 32, 4, kind=fg.FlashMHA, num_heads_kv=2)
    own.load_state_dict(cross.state_dict())
    padding = torch.arange(5) < torch.tensor([[5], [3]])
    near(cross(x, x_kv=y, key_padding_mask=padding), own(x, y, key_padding_mask=padding))
    near(cross(x, y, mixer_subset=slice(0, 1)), own(x[:, :1], y))
    layer = make("cpu", 32, 4, kind=mha.MHA, causal=True)
    cu_seqlens = torch.tensor([0, 9, 15], dtype=torch.int32)
    packed = layer(torch.cat([x[0], x[1, :6]]), cu_seqlens=cu_seqlens, max_seqlen=9)
    near(packed[9:], layer(x[1:, :6])[0])
    for heads in (4, 2):
        layer = mha.MHA(32, 4, heads, causal=True, dwconv=True)     # float64 convolutions take seconds
        x = x.float()
        torch.testing.assert_close(layer(x)[:, :6], layer(x[:, :6]))
    with pytest.raises(ValueError, match="cross_attn=True"):
        layer(x, y)


def test_flash_attns_mha_errors():
    for arguments in ((30, 4), (32, 4, 3), (32, 0)):
        with pytest.raises(ValueError, match="each must be a multiple of the next"):
            mha.MHA(*arguments)
    with pytest.raises(ValueError, match="rotary_emb_dim and cross_attn are given"):
        mha.MHA(32, 4, cross_attn=True, rotary_emb_dim=4)
    for wrong in (torch.randn(9, 32), torch.randn(2, 9, 16)):
        with pytest.raises(ValueError, match=r"x is \[.*\]: it must be \[batch, seq, embed_dim\] with embed_dim 32"):
            mha.MHA(32, 4)(wrong)
    x, padding, cu_seqlens = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool), torch.tensor([0, 9], dtype=torch.int32)
    for options, more in (
        ({}, dict(key_padding_mask=padding)),
        (dict(dwconv=True), {}),
        (dict(rotary_emb_dim=4), {}),
    ):
        with pytest.raises(ValueError, match="cu_seqlens is given: key_padding_mask, dwconv and rotary"):
            mha.MHA(32, 4, **options)(x[0], cu_seqlens=cu_seqlens, max_seqlen=9, **more)
    params = types.SimpleNamespace(
        max_seqlen=10, max_batch_size=2, seqlen_offset=0, batch_size_offset=0, key_value_memory_dict={}, lengths_per_sample=None
    )
    for options, more in (({}, dict(key_padding_mask=padding)), ({}, dict(cu_seqlens=cu_seqlens)), (dict(dwconv=True), {})):
        with pytest.raises(ValueError, match="inference_params is given: key_padding_mask, cu_seqlens and dwconv"):
            mha.MHA(32, 4, layer_idx=0, **options)(x, inference_params=params, **more)
    with pytest.raises(ValueError, match="the layer needs layer_idx"):
        mha.MHA(32, 4)(x, inference_params=params)
    params.seqlen_offset, params.lengths_per_sample = 3, torch.tensor([3, 3])
    with pytest.raises(ValueError, match="has no cache of this layer"):
        mha.MHA(32, 4, layer_idx=0)(x[:, :1], inference_params=params)
    layer = mha.MHA(32, 4, layer_idx=0, rotary_emb_dim=4, rotary_emb_scale_base=512)
    params.key_value_memory_dict[0] = layer.allocate_inference_cache(2, 10)
    with pytest.raises(NotImplementedError, match="have no xPos"):
        layer(x[:, :1], inference_params=params)
    for module, tensors in ((mha.FlashSelfAttention(), (x[..., None],)), (mha.FlashCrossAttention(), (x, x[:, None]))):
        with pytest.raises(ValueError, match=r"must be \[..., [23], heads, head dim\]"):
            module(*tensors)


def test_flash_mha_takes_flash_attns_arguments():
    layer = fg.FlashMHA(
        embed_dim=32, num_heads=4, num_heads_kv=2, qkv_proj_bias=False, dropout=0.1, softmax_scale=0.3, rotary_emb_dim=4,
        window_size=(3, -1), use_alibi=True, layer_idx=1, use_flash_attn=True, cross_attn=False,
    )  # fmt: skip
    assert (layer.num_kv_heads, layer.dropout_p, layer.scale, layer.rotary_dim, layer.window) == (2, 0.1, 0.3, 4, (3, None))
    assert layer.W_q.bias is None and layer.alibi_slopes.shape == (4,)
    assert fg.FlashMHA(32, 4, out_proj_bias=False, window_size=(-1, -1)).W_q.bias is not None
    with pytest.raises(TypeError, match="unknown argument 'heads'"):
        fg.FlashMHA(32, 4, heads=2)
    for options in (
        dict(num_kv_heads=2, num_heads_kv=2), dict(scale=0.1, softmax_scale=0.2), dict(alibi=False, use_alibi=True),
        dict(rotary_emb_dim=4, rotary_dim=4), dict(d_model=32, embed_dim=32),
    ):  # fmt: skip
        first, second = options
        with pytest.raises(TypeError, match=f"FlashMHA got {first} and {second}, which are the same"):
            fg.FlashMHA(num_heads=4, **{"d_model": 32, **options})
    with pytest.raises(TypeError, match="needs d_model"):
        fg.FlashMHA(num_heads=4)
    with pytest.raises(NotImplementedError, match="dwconv"):
        fg.FlashMHA(32, 4, dwconv=True)


# ---- rotary embeddings ----


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
@on_devices
def test_rotary(device, interleaved, dim):
    dtype = DEVICES[device][0]
    cos, sin = tables(20, dim, dtype, device)
    x, offsets = embed(device, 2, 5, 3, 8), torch.tensor([7, 0], device=device)
    positions = torch.arange(5)
    for offset, at in ((0, positions), (4, positions + 4), (offsets, positions + offsets.cpu()[:, None])):
        expected = turned(x.cpu(), at, dim, interleaved)
        out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
        near(out.cpu(), expected, device)
        gradient, = gradients((out,), (x,))
        near(gradient.cpu(), gradients((expected,), (x,))[0].cpu(), device)
        copied = x * 1
        assert rotary.apply_rotary_emb(copied, cos, sin, interleaved, inplace=True, seqlen_offsets=offset) is copied
        assert torch.equal(copied, out)
        assert torch.equal(gradients((copied,), (x,))[0], gradient)
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    for offset, shift in ((0, [0, 0, 0, 0, 0]), (torch.tensor([3, 9, 1], device=device), [3, 3, 1, 1, 1])):
        out = rotary.apply_rotary_emb(x[0], cos, sin, interleaved, seqlen_offsets=offset, cu_seqlens=cu_seqlens, max_seqlen=3)
        near(out.cpu(), turned(x[0].cpu(), torch.tensor([0, 1, 0, 1, 2]) + torch.tensor(shift), dim, interleaved), device)
    out = rotary.apply_rotary_emb_torch(x, cos[:5], sin[:5], interleaved)
    near(out.cpu(), turned(x.cpu(), positions, dim, interleaved), device)


def test_rotary_narrow_dtypes_and_errors():
    cos, sin = tables(9, 8, torch.bfloat16)
    x = randn(2, 5, 3, 8, dtype=torch.bfloat16)
    exact = rotary.apply_rotary_emb(x.double(), cos.double(), sin.double())
    assert torch.equal(rotary.apply_rotary_emb(x, cos, sin), exact.bfloat16())
    with pytest.raises(ValueError, match="from 5 to 9"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=5)
    with pytest.raises(ValueError, match="from 0 to 9"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"\[batch\]"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0]))
    with pytest.raises(ValueError, match="head dim"):
        rotary.apply_rotary_emb(x[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"x is \[5, 3, 8\]"):
        rotary.apply_rotary_emb(x[0], cos, sin)
    for number in (None, 4, 2):
        with pytest.raises(ValueError, match=rf"qkv is \[2, 5, 3, 8\] and num_heads_q {number}: it must be"):
            rotary.apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=number)
    for call, name in ((rotary.apply_rotary_emb_qkv_, "qkv"), (rotary.apply_rotary_emb_kv_, "kv")):
        with pytest.raises(ValueError, match=rf"^{name} is \[2, 5, 1, 3, 8\]: it must be"):
            call(x[:, :, None], cos, sin)
    # Queries alone: as many heads as num_heads_q.
    alone = rotary.apply_rotary_emb_qkv_(x.detach().clone(), cos, sin, num_heads_q=3)
    assert torch.equal(alone, rotary.apply_rotary_emb(x, cos, sin))


@pytest.mark.parametrize("scale_base", [None, 512])
def test_rotary_embedding(scale_base):
    module = rotary.RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    qkv = randn(2, 5, 3, 4, 8, grad=False)
    out = module(qkv.clone(), seqlen_offset=2)
    power = (torch.arange(7).double() - 3) / 512
    scale = ((torch.arange(0, 8, 2).double() + 0.4 * 8) / (1.4 * 8)) ** power[:, None] if scale_base else torch.ones(7, 4)
    scale = torch.cat([scale, scale], -1)[2:, None]
    expected = [turned(x, torch.arange(2, 7), 8, base=100.0) for x in qkv.unbind(2)]
    for a, b in zip(out.unbind(2), (expected[0] * scale, expected[1] / scale, qkv[:, :, 2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)    # angles are float32
    grouped = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], 2)
    q, k, v = module(grouped.clone(), seqlen_offset=2, num_heads_q=4).split((4, 2, 2), 2)
    assert torch.equal(q, out[:, :, 0]) and torch.equal(k, out[:, :, 1, :2]) and torch.equal(v, qkv[:, :, 2, :2])
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([2, 2]), max_seqlen=7)
    assert torch.equal(q, out[:, :, 0]) and torch.equal(kv, out[:, :, 1:])
    assert not module.state_dict() and module.half()(qkv.half()).dtype == torch.float16


# ---- padding ----


@on_devices
def test_padding_there_and_back(device):
    x = embed(device, 3, 5, 2, 4)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], device=device)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and torch.equal(indices, mask.flatten().nonzero()[:, 0])
    assert cu_seqlens.tolist() == [0, 3, 3, 8] and cu_seqlens.dtype == torch.int32 and longest == 5 and type(longest) is int
    assert used.tolist() == [3, 0, 5] and used.dtype == torch.int32
    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    weight = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad((padded * weight).sum(), x)[0], weight * mask[..., None, None])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0] * 5, [0] * 5], device=device)
    _, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.bool(), unused.bool())
    assert cu_seqlens.tolist() == [0, 4, 4, 9] and used.tolist() == [3, 0, 5] and indices[2] == 2
    rows = torch.tensor([4, 0], device=device)
    flat = x.flatten(0, 1)
    assert torch.equal(bert_padding.index_first_axis(flat, rows), flat[rows])
    assert torch.equal(bert_padding.index_put_first_axis(flat[rows], rows, 6)[4], flat[4])
    chosen, residual = bert_padding.index_first_axis_residual(flat, rows)
    assert torch.equal(chosen, flat[rows]) and torch.equal(residual, flat)


def test_padding_of_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = randn(3, 6, 4)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(bert_padding.pad_input(tokens, indices, 3, 6)[0, :5], x[0, :5])
    empty = bert_padding.unpad_input(x[:0], lengths[:0])
    assert empty[2].tolist() == [0] and empty[3] == 0


# ---- pooled heads ----


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_mean_pool_of_arrays(dtype):
    dtype = numpy.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x = numpy.random.default_rng(0).standard_normal((2, 6, 5, 4)).astype(dtype)
    pooled = flashgqa.mean_pool_kv_heads(x, 2)
    exact = numpy.stack([x[:, :3].astype("float64").mean(1), x[:, 3:].astype("float64").mean(1)], 1)
    assert pooled.dtype == dtype and pooled.shape == (2, 2, 5, 4)
    assert abs(pooled.astype("float64") - exact).max() <= 2 * float(ml_dtypes.finfo(dtype).eps) * abs(exact).max()
    assert numpy.array_equal(flashgqa.mean_pool_kv_heads(x.swapaxes(1, 2), 2, axis=-2), pooled.swapaxes(1, 2))
    assert numpy.array_equal(fg.mean_pool_kv_heads(x, 2), pooled)
    if dtype.itemsize > 2:
        ours = flashgqa.mean_pool_kv_heads(torch.from_numpy(x), 2)
        assert isinstance(ours, torch.Tensor)
        numpy.testing.assert_allclose(ours.numpy(), pooled, rtol=1e-6)
    with pytest.raises(ValueError, match="divide"):
        flashgqa.mean_pool_kv_heads(x, 4)
    with pytest.raises(ValueError, match="axis is 4"):
        flashgqa.mean_pool_kv_heads(x, 2, axis=4)
    with pytest.raises(TypeError, match="flashgqa.torch.mean_pool_kv_heads"):
        flashgqa.mean_pool_kv_heads("x", 2)


def test_mean_pool_of_models():
    model = torch.nn.Sequential(make("cpu", 32, 4, causal=True), torch.nn.Sequential(make("cpu", 32, 4, kind=fg.FlashMHA)))
    model[0].W_v.bias.requires_grad_(False)
    pooled = fg.mean_pool_kv_heads(model, 1)
    assert pooled[0].num_kv_heads == 1 and type(pooled[1][0]) is fg.FlashMHA and model[0].num_kv_heads == 4
    assert pooled[0].W_k.weight.shape == (8, 32) and not pooled[0].W_v.bias.requires_grad
    near(pooled[1][0].W_k.weight, model[1][0].W_k.weight.view(4, 8, 32).mean(0))
    assert pooled(randn(2, 9, 32)).shape == (2, 9, 32)
    with pytest.raises(TypeError, match="holds no FlashGQA"):
        fg.mean_pool_kv_heads(torch.nn.Linear(2, 2), 1)
