"""torch tensors in and out."""

import sys

import numpy
import pytest
from capsules import inputs

import flashgqa

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Q, K, V = inputs()
EXPECTED = flashgqa.attention(Q, K, V)


def attend(q, **options):
    return flashgqa.attention(q, K, V, **options)


# ---- torch ----


def torch_inputs(dtype=torch.float32):
    return [torch.from_numpy(x).to(dtype) for x in (Q, K, V)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(dtype):
    q, k, v = torch_inputs(dtype)
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is torch.Tensor
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == (4, 3, 8) and lse.shape == (4, 3) and out.is_contiguous() and not out.requires_grad
    assert out.data_ptr() % 64 == 0
    assert torch.allclose(out.float(), torch.from_numpy(EXPECTED), atol=2e-2)
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse)
    assert [g.dtype for g in gradients[:3]] == [dtype] * 3 and gradients.dbias is None


def test_torch_out_is_written_in_place():
    q, k, v = torch_inputs()
    out = torch.empty(4, 3, 8)
    address = out.data_ptr()
    assert flashgqa.attention(q, k, v, out=out) is out
    assert out.data_ptr() == address and numpy.array_equal(out.numpy(), EXPECTED)


def test_torch_results_are_torchs_own_memory():
    """Memory that came back through DLPack could not be resized, nor recorded on streams."""
    out = flashgqa.attention(*torch_inputs())
    assert out.untyped_storage().resizable()


def test_torch_views_in_place():
    wide = torch.randn(4, 3, 2, 8)
    q = wide[:, :, 1]
    assert torch.equal(flashgqa.attention(q, q, q), flashgqa.attention(*[q.contiguous()] * 3))
    expanded = torch.randn(1, 3, 8).expand(4, 3, 8)
    assert torch.equal(flashgqa.attention(expanded, expanded, expanded), flashgqa.attention(*[expanded.contiguous()] * 3))


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (1, 0, 2), (2, 1, 0)], ids=str)
def test_torch_results_are_contiguous_whatever_the_strides_of_q(order):
    """Also where q, of the shape of the result, had to be copied."""
    q, k, v = torch_inputs()
    strided = q.permute(order).contiguous().permute([order.index(n) for n in range(3)])
    assert torch.equal(strided, q)
    out = flashgqa.attention(strided, k, v)
    assert out.is_contiguous()
    assert torch.equal(out, flashgqa.attention(q, k, v))


def test_torch_references_do_not_leak():
    tensors = torch_inputs()
    before = [sys.getrefcount(x) for x in tensors]
    for _ in range(10):
        flashgqa.attention(*tensors)
        with pytest.raises(ValueError):
            flashgqa.attention(*tensors, chunk=0)
    assert [sys.getrefcount(x) for x in tensors] == before


def test_torch_grad_mode():
    q, k, v = torch_inputs()
    for leaf in (q.clone().requires_grad_(), torch.nn.Parameter(q)):
        with pytest.raises(BufferError, match=r"q requires grad.*flashgqa\.torch, or detach\(\) it or run under"):
            flashgqa.attention(leaf, k, v)
        with torch.no_grad():
            assert numpy.array_equal(flashgqa.attention(leaf, k, v).numpy(), EXPECTED)
        assert numpy.array_equal(flashgqa.attention(leaf.detach(), k, v).numpy(), EXPECTED)
    with torch.inference_mode():
        assert numpy.array_equal(flashgqa.attention(q.clone(), k, v).numpy(), EXPECTED)


def wrappers():
    def fake():
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            return torch.empty(4, 3, 8)

    class Sub(torch.Tensor):
        pass

    q = torch.from_numpy(Q)
    freed = q.clone()
    freed.untyped_storage().resize_(0)
    return {
        "fake": (fake, TypeError, "torch.Tensor subclass, FakeTensor"),
        "subclass": (lambda: q.as_subclass(Sub), TypeError, "torch.Tensor subclass, Sub"),
        "functional": (lambda: torch._to_functional_tensor(q), BufferError, "q"),
        "sparse": (q.to_sparse, BufferError, "memory cannot be read"),
        "mkldnn": (q.to_mkldnn, BufferError, "memory cannot be read"),
        "meta": (lambda: q.to("meta"), BufferError, "meta"),
        "negative bit": (lambda: torch.view_as_complex(torch.ones(4, 3, 8, 2)).conj().imag, BufferError, r"resolve_neg\(\)"),
        "complex": (lambda: q.to(torch.complex64), TypeError, "complex64"),
        "freed": (lambda: freed, BufferError, "no memory"),
        "nested": (lambda: torch.nested.nested_tensor([q[0], q[1]]), BufferError, "q"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(wrappers()))
def test_torch_tensor_that_is_not_its_memory(case):
    make, error, text = wrappers()[case]
    with pytest.raises(error, match=text):
        attend(make())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("case", list(wrappers()))
def test_torch_tensor_that_is_not_its_memory_after_others_that_were(case, at):
    """Tensors like earlier ones are asked less."""
    make, error, text = wrappers()[case]
    tensors = torch_inputs()
    for _ in range(2):
        flashgqa.attention(*tensors)
    if case == "negative bit":
        tensors = [torch.stack([x, x])[0] for x in tensors]
    tensors[at] = make()
    with pytest.raises(error, match=text.replace("q", "qkv"[at], 1) if text == "q" else text.replace("q.", "qkv"[at] + ".")):
        flashgqa.attention(*tensors)


def test_torch_negative_bit_is_seen_after_others_without():
    """The same memory, shape, strides and dtype: the bit is all the difference."""
    q, k, v = torch_inputs()
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    for n, name in enumerate("qkv"):
        tensors = [q, k, v]
        tensors[n] = torch._neg_view(tensors[n])
        with pytest.raises(BufferError, match=rf"{name}.resolve_neg\(\)"):
            flashgqa.attention(*tensors)
    for _ in range(2):
        flashgqa.attention_backward(out, q, k, v, out.clone(), lse)
    with pytest.raises(BufferError, match="lse has torch's negative bit"):
        flashgqa.attention_backward(out, q, k, v, out.clone(), torch._neg_view(lse))


def test_torch_gradients_are_refused_after_a_call_that_recorded_none():
    q, k, v = torch_inputs()
    leaf = k.clone().requires_grad_()
    for _ in range(3):
        with torch.no_grad():
            flashgqa.attention(q, leaf, v)
        with pytest.raises(BufferError, match="k requires grad"):
            flashgqa.attention(q, leaf, v)


def test_torch_guards_are_there_wherever_the_first_call_is():
    from torch._subclasses import FakeTensorMode

    from flashgqa import _torch_guard

    assert _torch_guard.guard_of is not None
    for mode in (torch.inference_mode, FakeTensorMode, lambda: torch.device("meta"), lambda: torch.autocast("cpu")):
        with mode():
            assert _torch_guard._find() is not None


def test_torch_one_tensor_for_all():
    x = torch.from_numpy(Q)
    expected = flashgqa.attention(Q, Q, Q)
    for _ in range(3):
        assert numpy.array_equal(flashgqa.attention(x, x, x).numpy(), expected)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_refused(transform):
    q, k, v = torch_inputs()
    call = {
        "vmap": lambda: torch.vmap(lambda x: flashgqa.attention(x, k, v))(torch.stack([q, q])),
        "grad": lambda: torch.func.grad(lambda x: flashgqa.attention(x, k, v).sum())(q),
        "jvp": lambda: torch.func.jvp(lambda x: flashgqa.attention(x, k, v), (q,), (q,)),
    }[transform]
    with pytest.raises(BufferError, match="q"):
        call()


def test_torch_modes_that_fake_results():
    """A real q under a mode whose new tensors have no memory: refused, and nothing is written anywhere."""
    from torch._subclasses import FakeTensorMode

    q, k, v = torch_inputs()
    flashgqa.attention(q, k, v)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(BufferError, match="q: its memory|no memory for a result"):
            flashgqa.attention(q, k, v)
    with torch.device("meta"):
        assert numpy.array_equal(flashgqa.attention(q, k, v).numpy(), EXPECTED)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_torch_compile_runs_the_function_outside_of_its_graph():
    q, k, v = torch_inputs()
    compiled = torch.compile(lambda x: 2 * flashgqa.attention(x + 0, k, v), backend="eager")
    assert torch.equal(compiled(q), 2 * flashgqa.attention(q, k, v))


def test_torch_empty_tensors():
    q = torch.empty(2, 4, 0, 8)
    assert flashgqa.attention(q, torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)).shape == (2, 4, 0, 8)
    out = flashgqa.attention(torch.ones(2, 4, 3, 8), torch.empty(2, 2, 0, 8), torch.empty(2, 2, 0, 8))
    assert torch.equal(out, torch.zeros(2, 4, 3, 8))
