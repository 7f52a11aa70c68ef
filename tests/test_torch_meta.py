"""Attention of tensors without memory, and what torch's counter of floating-point operations says of it."""

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import flashgqa.torch as fg  # noqa: E402

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "bshd": {"layout": "bshd"},
    "bias and sink": {"bias": (1, 1, 5, 7), "sink": (4,)},
    "dropout": {"dropout_p": 0.5},
}


def tensors(layout=None, device="cpu", **options):
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)]
    q, k, v = (torch.randn(s if layout is None else (s[0], s[2], s[1], s[3]), device=device, requires_grad=True) for s in shapes)
    more = {name: torch.randn(x, device=device, requires_grad=True) if isinstance(x, tuple) else x for name, x in options.items()}
    return (q, k, v), {**more, "layout": layout}


@pytest.mark.parametrize("name", OPTIONS)
def test_shapes_without_memory(name):
    """Results and gradients of meta tensors have the shapes, dtypes and strides of real ones."""
    found = []
    for device in ("cpu", "meta"):
        arrays, options = tensors(device=device, **OPTIONS[name])
        out, lse = fg.attention(*arrays, **options, return_lse=True)
        plain = fg.attention(*arrays, **options)
        (out.sum() + lse.sum()).backward()
        leaves = [*arrays, *(x for x in options.values() if isinstance(x, torch.Tensor))]
        fixed = fg.attention(*(x.detach() for x in arrays), layout=options["layout"])
        results = [out, lse, plain, fixed, *(x.grad for x in leaves)]
        assert all(x.device.type == device for x in results)
        found.append([(x.shape, x.dtype, x.stride()) for x in results])
    assert found[0] == found[1]


def test_layers_and_drop_ins_without_memory():
    with torch.device("meta"):
        layer = fg.FlashGQA(32, num_heads=4, num_kv_heads=2, causal=True, rotary_dim=8)
        assert layer(torch.empty(2, 5, 32)).shape == (2, 5, 32)
        q, k = torch.empty(2, 4, 5, 8), torch.empty(2, 2, 7, 8)
        assert fg.scaled_dot_product_attention(q, k, k, enable_gqa=True).shape == q.shape
        assert fg.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, k))).shape == (2, 5, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fg.attention(q, k, k).dtype == F.scaled_dot_product_attention(q, k, k, enable_gqa=True).dtype


def test_tensors_of_two_kinds_are_refused():
    q = torch.empty(1, 2, 3, 8)
    with pytest.raises(BufferError, match="k: "):
        fg.attention(q, q.to("meta"), q)


# ---- operations ----


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", [None, "bshd"])
@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_those_of_all_scores(causal, layout):
    """Two products of rows and keys forward, five backward; d = 8, dv = 6."""
    (q, k, v), options = tensors(layout)
    scores = 2 * 4 * 5 * 7
    assert counted(lambda: fg.attention(q, k, v, causal=causal, **options)) == 2 * scores * (8 + 6)
    assert counted(lambda: fg.attention(q, k, v, causal=causal, **options).sum().backward()) == 2 * scores * (4 * 8 + 3 * 6)


def test_operations_of_joined_sequences():
    q, k = torch.randn(9, 4, 8), torch.randn(12, 2, 8)
    cu = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 9], [0, 10, 12])]

    def run(q, k, cu):
        return fg.attention(q, k, k, cu_seqlens_q=cu[0], cu_seqlens_kv=cu[1])

    assert counted(lambda: run(q, k, cu)) == 2 * 4 * (2 * 10 + 7 * 2) * 16
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, *cu)]
        assert counted(lambda: run(*fake[:2], fake[2:])) == 2 * 4 * (9 * 12 // 2) * 16


def test_operations_as_torch_counts_its_own():
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    q, k, v = (torch.randn(2, 4, *shape, requires_grad=True) for shape in ((5, 8), (7, 8), (7, 6)))
    shapes, out = [x.shape for x in (q, k, v)], torch.Size((2, 4, 5, 6))
    own = sdpa_flop_count(*shapes), sdpa_backward_flop_count(out, *shapes)
    assert counted(lambda: fg.attention(q, k, v).sum().backward()) == sum(own)
