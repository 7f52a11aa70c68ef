"""What we are compared with. A peer is a class; one that cannot be imported says why and is left out."""


class TorchSDPA:
    """torch.nn.functional.scaled_dot_product_attention on the CPU, as its users call it."""
    name = "torch"

    def __init__(self, threads):
        import torch
        self.torch = torch
        torch.set_num_threads(threads)
        self.version = f"torch {torch.__version__}"

    def inputs(self, row, seed=0):
        """q, k, v, dout of a row as torch tensors [b, h, s, d]; both contestants read the same memory."""
        torch = self.torch
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, row.dtype)

        def normal(heads, length):
            return torch.randn(row.b, heads, length, row.d, generator=generator).to(dtype)

        return normal(row.hq, row.sq), normal(row.hk, row.s), normal(row.hk, row.s), normal(row.hq, row.sq)

    def _sdpa(self, row, q, k, v):
        return self.torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=row.causal, enable_gqa=row.hq != row.hk)

    def forward(self, row, q, k, v):
        def call():
            with self.torch.no_grad():
                return self._sdpa(row, q, k, v)
        return call

    def backward(self, row, q, k, v, dout):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = self._sdpa(row, *leaves)
        return lambda: self.torch.autograd.grad(out, leaves, dout, retain_graph=True)


class FlashGQA:
    name = "flashgqa"

    def __init__(self, threads):
        import flashgqa
        self.module = flashgqa
        flashgqa.set_num_threads(threads)
        self.version = f"flashgqa {flashgqa.__version__}"

    def forward(self, row, q, k, v):
        return lambda: self.module.attention(q, k, v, causal=row.causal)

    def backward(self, row, q, k, v, dout):
        out, lse = self.module.attention(q, k, v, causal=row.causal, return_lse=True)
        return lambda: self.module.attention_backward(dout, q, k, v, out, lse, causal=row.causal)[:3]
