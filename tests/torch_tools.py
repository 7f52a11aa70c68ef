"""What the tests of flashgqa.torch share: random leaves, gradients, comparisons."""

import inspect

import pytest
from conftest import has_gpu

torch = pytest.importorskip("torch")

# Its products here are small; more threads would wait for each other and for the kernels' own pool.
torch.set_num_threads(1)

# Where the tests that take `device` run, in which dtype, and how near to the truth that comes.
DEVICES = {"cpu": (torch.float64, 1e-12)}
if has_gpu() and torch.cuda.is_available():
    DEVICES["cuda"] = (torch.float32, 1e-4)
on_devices = pytest.mark.parametrize("device", list(DEVICES))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float64, grad=True, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def inputs(b=2, hq=4, hk=2, sq=5, sk=7, d=8, dv=6, **options):
    return tuple(randn(*shape, **options) for shape in ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv)))


def arguments_of(function):
    """Its signature as text, whatever it says of the type of its result."""
    return str(inspect.signature(function).replace(return_annotation=inspect.Signature.empty))


def leaves(*tensors):
    return tuple(x if x is None else x.detach().clone().requires_grad_() for x in tensors)


def gradients(outputs, tensors, *cotangents):
    return torch.autograd.grad(outputs, tensors, cotangents or [torch.cos(x.detach()) for x in outputs])


def seen(sq, sk, causal=False, window=(-1, -1), device="cpu"):
    """Bool [sq, sk]: what row i sees, whose own key is i + sk - sq; window as flash_attn has it, -1 for no bound."""
    left, right = window
    place = torch.arange(sk, device=device) - torch.arange(sk - sq, sk, device=device)[:, None]
    allowed = place <= (0 if causal else right if right >= 0 else sq)
    return allowed & (place >= -left) if left >= 0 else allowed


def dense(q, k, v, allowed, bias=None, scale=None):
    """Attention of [b, s, h, d] by torch's softmax, and lse [b, h, sq]; rows that see nothing are 0 with lse -inf."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores if bias is None else scores + bias).masked_fill(~allowed, -torch.inf)
    any_seen = allowed.any(-1, keepdim=True)
    weights = torch.where(any_seen, scores, 0).softmax(-1) * any_seen
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def turned(x, positions, dim, interleaved=False, base=10000.0):
    """Rotation of pairs as multiplication by exp(i angle); x [..., seq, heads, d], positions [..., seq]."""
    angles = positions.double()[..., None, None] * base ** -(torch.arange(0, dim, 2).double() / dim)
    head, rest = x[..., :dim].double(), x[..., dim:].double()
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), rest], -1)


def tables(count, dim, dtype=torch.float64, device="cpu", base=10000.0):
    """cos and sin of rotary embeddings, [count, dim / 2]."""
    angles = torch.arange(count).double()[:, None] * base ** -(torch.arange(0, dim, 2).double() / dim)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def near(got, expected, device="cpu"):
    """Equal, but for the rounding of the dtype that DEVICES gives the device."""
    torch.testing.assert_close(got, expected, rtol=0, atol=DEVICES[device][1], check_dtype=False)


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def assert_near(got, expected, naive, dtype, factor):
    """The error rule of the suite (flashgqa/_bounds.py), with torch's own narrow computation as the naive one.

    In float64 that is the truth itself, and has no error; nor has it where all is zero, a few roundings of sums apart.
    """
    expected = expected.double()
    error, largest = (got.double() - expected).abs().max(), expected.abs().max()
    if dtype == torch.float64:
        assert error <= 1e-13 * max(largest, 1)
    else:
        rounding = 2 * torch.finfo(dtype).eps * largest + 64 * torch.finfo(torch.float32).eps
        assert error <= factor * (naive.double() - expected).abs().max() + rounding
