"""flashgqa.torch in training: a model written for flash_attn, two processes, two threads, torch's hook for flash implementations,
its error where memory does not suffice.
"""

import os
import pathlib
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import flashgqa

torch = pytest.importorskip("torch")

import torch_distributed  # noqa: E402
from torch.nn import attention as hooks  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_tools import DEVICES, assert_near, dense, gradients, inputs, on_devices, randn, seeded, seen  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402

# ---- a model written for flash_attn ----

LLAMA = """
import torch
from torch.nn import functional as F
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb

class Layer(torch.nn.Module):
    def __init__(self, width=32, heads=4, kv_heads=2):
        super().__init__()
        self.d = width // heads
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(2))
        self.q, self.o = torch.nn.Linear(width, width, bias=False), torch.nn.Linear(width, width, bias=False)
        self.kv = torch.nn.Linear(width, 2 * kv_heads * self.d, bias=False)
        self.gate, self.up = torch.nn.Linear(width, 48, bias=False), torch.nn.Linear(width, 48, bias=False)
        self.down = torch.nn.Linear(48, width, bias=False)

    def forward(self, x, cos, sin, mask):
        y = self.norms[0](x)
        q, (k, v) = self.q(y).unflatten(-1, (-1, self.d)), self.kv(y).unflatten(-1, (2, -1, self.d)).unbind(2)
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin, interleaved=False)
        if mask is None:
            out = flash_attn_func(q, k, v, causal=True, window_size=(6, 0))
        else:
            q, where, cu, longest, _ = unpad_input(q, mask)
            k, v = unpad_input(k, mask)[0], unpad_input(v, mask)[0]
            out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, window_size=(6, 0))
            out = pad_input(out, where, *mask.shape)
        x = x + self.o(out.flatten(-2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

class Llama(torch.nn.Module):
    def __init__(self, words=19, width=32, layers=2):
        super().__init__()
        self.embed = torch.nn.Embedding(words, width)
        self.layers = torch.nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = torch.nn.RMSNorm(width), torch.nn.Linear(width, words, bias=False)

    def forward(self, tokens, mask=None):
        x, d = self.embed(tokens), self.layers[0].d
        angles = torch.arange(tokens.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
        cos, sin = (y.to(x.device, x.dtype) for y in (angles.cos(), angles.sin()))
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        loss = F.cross_entropy(self.head(self.norm(x))[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return loss.mean() if mask is None else loss[mask[:, 1:].bool()].mean()
"""


def eager_attention(q, k, v, causal, window_size):
    return dense(q, k, v, seen(q.shape[1], k.shape[1], causal, window_size, q.device))[0]


def eager_varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, **options):
    lengths = cu_q.diff().tolist()
    parts = zip(*(x[None].split(lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([eager_attention(*part, **options)[0] for part in parts])


def eager_rotary(x, cos, sin, interleaved=False):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos[:, None] - b * sin[:, None], a * sin[:, None] + b * cos[:, None]), -1)


@pytest.fixture
def llamas(monkeypatch):
    """The model over flashgqa, by other import lines alone, and over plain PyTorch under flash_attn's names."""
    ours = {}
    exec(LLAMA.replace("from flash_attn", "from flashgqa.torch"), ours)
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_func, fake.flash_attn_varlen_func = eager_attention, eager_varlen
    padding, rotary = types.ModuleType("flash_attn.bert_padding"), types.ModuleType("flash_attn.layers.rotary")
    padding.unpad_input, padding.pad_input = fg.bert_padding.unpad_input, fg.bert_padding.pad_input
    rotary.apply_rotary_emb = eager_rotary
    for module in (fake, padding, rotary, types.ModuleType("flash_attn.layers")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    eager = {}
    exec(LLAMA, eager)
    return ours["Llama"], eager["Llama"]


@on_devices
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", ["exact", "bfloat16"])
def test_training_step_after_changing_the_imports(llamas, device, padded, dtype):
    exact = DEVICES[device][0]
    dtype = exact if dtype == "exact" else torch.bfloat16
    tokens = torch.randint(19, (3, 17), device=device)
    mask = (torch.arange(17) < torch.tensor([[17], [9], [13]])).to(device) if padded else None
    results, state = [], llamas[0]().state_dict()
    for kind, to in ((llamas[0], dtype), (llamas[1], torch.float64), (llamas[1], dtype)):
        model = kind()
        model.load_state_dict({name: x.to(dtype) for name, x in state.items()})
        model = model.to(device, to)
        model.load_state_dict({name: x.to(device, dtype).to(to) for name, x in state.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(tokens, mask)
        loss.backward()
        grads = [x.grad.clone() for x in model.parameters()]
        optimizer.step()
        results.append((loss.detach(), *grads, model(tokens, mask).detach()))
    for ours, truth, eager in zip(*results, strict=True):
        if dtype == torch.bfloat16:
            assert_near(ours, truth, eager, dtype, 3)
        else:
            torch.testing.assert_close(ours.double(), truth, rtol=0, atol=DEVICES[device][1])


# ---- two processes, two threads ----


def test_two_processes(tmp_path):
    """DDP, FSDP with sharded parameters, and heads shared out, over gloo: what one process does with the whole batch."""
    path = os.pathsep.join(filter(None, [str(pathlib.Path(flashgqa.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, torch_distributed.__file__, str(tmp_path / "store"), str(tmp_path / "result")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    alone = torch_distributed.model()
    torch_distributed.train(alone, torch_distributed.batch())
    trained, (message, heads, expected) = torch.load(tmp_path / "result")
    assert "q is a DTensor" in message and "local_map" in message and torch.equal(heads, expected)
    for found in trained.values():
        for a, b in zip(found, alone.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)


@on_devices
def test_two_threads_train_two_models(device):
    dtype = torch.float32

    def train(seed):
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream):
            generator = torch.Generator().manual_seed(seed)
            layer = fg.FlashGQA(32, 4, 2, causal=True, rotary_dim=4, device=device, dtype=dtype)
            with torch.no_grad():
                for x in layer.parameters():
                    x.copy_(torch.randn(x.shape, generator=generator) / 6)
            x = torch.randn(3, 70, 32, generator=generator).to(device)
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
            for _ in range(5):
                optimizer.zero_grad()
                (layer(x) - x).square().mean().backward()
                optimizer.step()
            results = [x.detach().cpu() for x in layer.parameters()]
        return results

    expected = [train(n) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(train, range(2)), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- torch's own switches ----


@pytest.fixture
def activated():
    hooks.activate_flash_attention_impl("FGQA")
    yield
    hooks.restore_flash_attention_impl()


def calls_of(monkeypatch, name):
    made, own = [], getattr(flashgqa._C, name)
    monkeypatch.setattr(flashgqa._C, name, lambda *arguments: made.append(name) or own(*arguments))
    return made


def flash(*tensors, **options):
    with hooks.sdpa_kernel(hooks.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*tensors, **options)


KINDS = [(device, kind) for device in DEVICES for kind in ("plain", "causal", "grouped", "mask")]


@pytest.mark.parametrize("device, kind", [x for x in KINDS if x != ("cuda", "mask")])       # torch's has no masks there
def test_torchs_flash_backend(activated, monkeypatch, device, kind):
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    mask = torch.rand(2, 1, 9, 9) < 0.8
    mask[..., 0] = True
    options = {"causal": dict(is_causal=True), "mask": dict(attn_mask=mask), "grouped": dict(enable_gqa=True)}.get(kind, {})
    tensors = inputs(hk=2 if kind == "grouped" else 4, sq=9, sk=9, d=8, dv=8, dtype=dtype)
    tensors = [x.detach().to(device).requires_grad_() for x in tensors]
    made = [calls_of(monkeypatch, name) for name in ("forward", "backward")]
    out = flash(*tensors, **options)
    found = gradients((out,), tensors)
    assert all(made) and hooks.current_flash_attention_impl() == "FGQA" and out.stride() == tensors[0].stride()
    truth = [x.detach().double().requires_grad_() for x in tensors]
    with hooks.sdpa_kernel(hooks.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*truth, **options)
        naive = F.scaled_dot_product_attention(*tensors, **options)
    cotangent = torch.cos(out.detach())
    wanted, rough = gradients((expected,), truth, cotangent.double()), gradients((naive,), tensors, cotangent)
    assert_near(out, expected, naive, dtype, 2)
    for a, b, c in zip(found, wanted, rough, strict=True):
        assert_near(a, b, c, dtype, 3)


def test_torchs_flash_backend_compiles_and_is_given_back(monkeypatch):
    assert "FGQA" in hooks.list_flash_attention_impls()
    tensors = inputs(hk=4, d=8, dv=8)
    own = flash(*tensors)
    hooks.activate_flash_attention_impl("FGQA")
    try:
        made = calls_of(monkeypatch, "forward")
        compiled = torch.compile(lambda *x: flash(*x).sin(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), own.sin(), rtol=0, atol=1e-13)
        assert made
    finally:
        hooks.restore_flash_attention_impl()
    del made[:]
    assert torch.equal(flash(*tensors), own) and not made


if "cuda" in DEVICES:       # where torch has it

    @pytest.mark.parametrize("device", ["cuda"])
    def test_torchs_varlen(activated, monkeypatch, device):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (randn(14, 4, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
        cu_seqlens = torch.tensor([0, 3, 14], dtype=torch.int32, device=device)
        made = calls_of(monkeypatch, "forward")
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 11, 11, window_size=(-1, 0))
        assert made
        expected = fg.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 11, 11, causal=True)
        assert torch.equal(out, expected)
        for a, b in zip(gradients((out,), (q, k, v)), gradients((expected,), (q, k, v)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, dict(return_lse=True), dict(bias=torch.zeros(5, 7).double(), return_lse=True)])
def test_batched_gradients(options):
    """torch.autograd's own vmap, in a process or in jacobian(vectorize=True): one call for each gradient."""
    q, k, v = inputs()
    options = {name: x.requires_grad_() if name == "bias" else x for name, x in options.items()}
    results = fg.attention(q, k, v, **options)
    of = (q, k, v, *(x for name, x in options.items() if name == "bias"))
    for result in results if isinstance(results, tuple) else (results,):
        douts = randn(3, *result.shape)
        batched = torch.autograd.grad(result, of, douts, is_grads_batched=True, retain_graph=True)
        for n in range(3):
            one = torch.autograd.grad(result, of, douts[n], retain_graph=True)
            assert all(torch.equal(a[n], b) for a, b in zip(batched, one, strict=True))
    q, k, v = (x.detach()[:1, :, :2] for x in (q, k, v))
    jacobians = [torch.autograd.functional.jacobian(lambda x: fg.attention(x, k, v), q, vectorize=way) for way in (False, True)]
    assert torch.equal(*jacobians)


class Named(torch.Tensor):
    """As fastai's and torchvision's tensors: methods of its own, and memory that is its values."""


@pytest.mark.parametrize("options", [{}, dict(bias=torch.ones(5, 7).double(), return_lse=True), dict(dropout_p=0.4, seed=3)])
def test_a_class_of_tensors_of_its_own(options):
    plain = inputs()
    named = [x.detach().clone().as_subclass(Named).requires_grad_() for x in plain]
    results, expected = (fg.attention(*x, **options) for x in (named, plain))
    results, expected = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    found, wanted = gradients(results, named), gradients(expected, plain)
    for a, b in zip((*results, *found), (*expected, *wanted), strict=True):
        assert type(a) is Named and torch.equal(a.as_subclass(torch.Tensor), b)
    x = randn(2, 5, 16, dtype=torch.float32).as_subclass(Named)
    assert type(fg.FlashGQA(16, 4, 2, causal=True)(x)) is Named


def test_the_negative_bit_of_views_of_complex_numbers():
    """Where the memory of a tensor is not its values: inputs, and gradients, which are nobody's choice."""
    q, k, v = inputs(grad=False)
    negative = [torch._neg_view(-x).requires_grad_() for x in (q, k, v)]
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    results, expected = (fg.attention(*x, causal=True, return_lse=True) for x in (negative, plain))
    cotangents = [randn(*x.shape, dtype=x.dtype, grad=False) for x in expected]
    found = torch.autograd.grad(results, negative, [torch._neg_view(-x) for x in cotangents])
    wanted = torch.autograd.grad(expected, plain, cotangents)
    for a, b in zip((*results, *found), (*expected, *wanted), strict=True):
        assert torch.equal(a, b)


def test_seeds_that_change_are_one_graph():
    q, graphs = randn(1, 2, 8, 8), []

    def function(q, seed):
        return fg.attention(q, q, q, dropout_p=0.5, seed=seed)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True)
    for seed in (7, 8, 2**40):
        assert torch.equal(compiled(q, seed), function(q, seed))
    assert len(graphs) == 1


def test_out_of_memory_is_torchs_error(activated, monkeypatch):
    q, k, v = inputs(hk=4, dv=8)
    out = fg.attention(q, k, v)

    def fail(*_):
        raise MemoryError("a workspace of 5 bytes does not fit into memory")

    monkeypatch.setattr(flashgqa._C, "forward", fail)
    monkeypatch.setattr(flashgqa._C, "backward", fail)
    plain = [x.detach() for x in (q, k, v)]
    calls = (lambda: fg.attention(q, k, v), lambda: fg.attention(*plain), lambda: out.sum().backward(), lambda: flash(*plain))
    for call in calls:
        with pytest.raises(torch.OutOfMemoryError, match="a workspace of 5 bytes"):
            call()


@on_devices
def test_deterministic_algorithms_and_the_same_bits(device):
    layer = fg.FlashGQA(64, 8, 2, causal=True, device=device, dtype=torch.float32)
    x = randn(4, 257, 64, dtype=torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            q, k, v = layer._heads(x, x)
            out = fg.flash_attn_func(q, k, v, causal=True, deterministic=False)
            results.append((out, *torch.autograd.grad(out.cos().sum(), (q, k, v))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
