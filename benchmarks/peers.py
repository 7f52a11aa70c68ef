"""What we are compared with. A peer is a class; a library that is not installed is represented by what it did elsewhere."""


def tensors(row, device="cuda"):
    """q, k, v, dout; [total, h, d] of packed sequences."""
    import torch
    torch.manual_seed(0)

    def normal(heads, length):
        shape = (sum(row.lengths), heads, row.d) if getattr(row, "lengths", ()) else (row.b, heads, length, row.d)
        return torch.randn(shape, device=device, dtype=getattr(torch, row.dtype))

    return normal(row.hq, row.sq), normal(row.hk, row.s), normal(row.hk, row.s), normal(row.hq, row.sq)


def difference(got, want):
    """The largest of the relative differences of two lists of tensors."""
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, want, strict=True))


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


class Sdpa:
    """One backend of torch's scaled_dot_product_attention on a GPU. options: its attn_mask, whose gradient is asked if it
    requires one, and dropout_p."""

    def __init__(self, backend, **options):
        self.backend, self.options = backend, options

    def forward(self, row, q, k, v):
        import torch
        from torch.nn.attention import sdpa_kernel
        options = dict(self.options, is_causal=row.causal, enable_gqa=q.shape[1] != k.shape[1])
        with sdpa_kernel(self.backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    def calls(self, row, q, k, v, dout):
        import torch

        def forward():
            with torch.no_grad():
                return self.forward(row, q, k, v)

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = self.forward(row, *leaves)
        mask = self.options.get("attn_mask")
        if mask is not None and mask.requires_grad:
            leaves.append(mask)
        return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


class FlashAttention2:
    """The kernels behind torch's FlashAttention-2 backend, called for what scaled_dot_product_attention does not offer: packed
    sequences, windows, and the diagonal of fewer queries than keys at the bottom right."""

    def forward(self, row, q, k, v, offsets):
        import torch
        options = {"window_size_left": row.window - 1, "window_size_right": 0} if row.window else {}
        if offsets is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = offsets, offsets, row.sq, row.s
        out = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, row.causal, False, **options)[0]
        return out if offsets is not None else out.transpose(1, 2)

    def calls(self, row, q, k, v, dout, offsets):
        import torch

        def forward():
            with torch.no_grad():
                return self.forward(row, q, k, v, offsets)

        if "backward" not in row.passes:
            return forward, None
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = self.forward(row, *leaves, offsets)
        return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


class OnGpu:
    """flashgqa, as its users call it."""

    def __init__(self, **options):
        self.options = options

    @staticmethod
    def in_cache(row, q, k, v):
        """Keys and values in pages that lie in any order."""
        import torch

        import flashgqa
        pages = row.b * row.s // row.page
        order = torch.randperm(pages, device="cuda")
        caches = [torch.empty(pages, row.hk, row.page, row.d, device="cuda", dtype=x.dtype) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[order] = x.unflatten(2, (-1, row.page)).transpose(1, 2).flatten(0, 1)
        lens = torch.full((row.b,), row.s, device="cuda", dtype=torch.int32)
        table = order.view(row.b, -1).to(torch.int32)
        return lambda: flashgqa.attention_with_kvcache(q, *caches, cache_lens=lens, page_table=table, causal=row.causal)

    def calls(self, row, q, k, v, dout, offsets=None):
        import flashgqa
        if getattr(row, "page", 0):
            return self.in_cache(row, q, k, v), None
        options = dict(self.options, causal=row.causal)
        if getattr(row, "window", 0):
            options["window"] = (row.window - 1, 0)
        if offsets is not None:
            options |= {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_q": row.s, "max_kv": row.s}
        out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)
        return (lambda: flashgqa.attention(q, k, v, **options),
                lambda: flashgqa.attention_backward(dout, q, k, v, out, lse, **options)[:3])


# TFLOP/s of forward and backward on one H200, bfloat16, 16,384 tokens a row, measured 2026-11-22: cuDNN 9.19 and FlashAttention-2
# of torch 2.11, FlashAttention-3 (0251105a), flash-attn-4 4.0.0b36; the mean of two runs in opposite order of peers.
# hq hk d s mask, then cuDNN FA2 FA3 FA4 forward, and backward.
_ELSEWHERE = """
16 16 128 1024 dense 598 330 622 572 446 231 489 496
16 16 128 4096 dense 665 345 707 697 547 289 604 627
16 16 128 16384 dense 675 356 736 733 562 309 624 623
16 16 128 1024 causal 422 246 478 405 317 170 360 366
16 16 128 4096 causal 573 304 682 629 483 255 548 559
16 16 128 16384 causal 613 322 736 676 559 312 632 647
32 8 128 1024 dense 628 339 654 600 440 222 451 460
32 8 128 4096 dense 670 356 693 705 539 288 573 597
32 8 128 16384 dense 652 349 732 712 542 307 605 613
32 8 128 1024 causal 461 267 524 424 310 163 317 328
32 8 128 4096 causal 588 325 686 631 485 256 535 536
32 8 128 16384 causal 635 342 743 710 541 310 610 595
64 8 128 1024 dense 638 345 631 615 447 231 473 480
64 8 128 4096 dense 663 362 723 709 535 294 570 575
64 8 128 16384 dense 638 351 707 690 547 313 605 615
64 8 128 1024 causal 484 276 540 438 316 170 336 350
64 8 128 4096 causal 594 337 693 615 478 264 529 538
64 8 128 16384 causal 622 346 706 690 527 312 588 597
32 1 128 1024 dense 627 338 646 603 443 228 474 485
32 1 128 4096 dense 653 354 715 701 544 291 586 599
32 1 128 16384 dense 652 351 722 712 540 308 611 615
32 1 128 1024 causal 463 268 539 428 314 169 343 354
32 1 128 4096 causal 590 326 701 639 472 261 558 556
32 1 128 16384 causal 632 341 751 715 542 311 609 603
32 8 64 1024 dense 434 288 384 439 354 206 394 408
32 8 64 4096 dense 473 303 501 559 446 266 523 542
32 8 64 16384 dense 489 308 567 585 460 287 526 536
32 8 64 1024 causal 332 216 297 303 236 144 262 280
32 8 64 4096 causal 434 282 484 490 378 226 467 468
32 8 64 16384 causal 462 298 556 565 447 272 548 546
16 4 256 1024 dense 658 312 696 672 299 195 354 290
16 4 256 4096 dense 715 326 753 746 394 244 446 366
16 4 256 16384 dense 704 326 767 787 359 260 459 379
16 4 256 1024 causal 509 267 539 498 250 146 265 226
16 4 256 4096 causal 642 302 724 720 373 219 425 336
16 4 256 16384 causal 687 313 794 790 386 253 457 376
"""
_NAMES = ("cuDNN", "FA2", "FA3", "FA4")


def elsewhere(row, which):
    """{peer: TFLOP/s} of a row of shapes.GPU_TRAIN in that table."""
    for line in _ELSEWHERE.split("\n"):
        cells = line.split()
        if cells[:5] == [*map(str, (row.hq, row.hk, row.d, row.s)), "causal" if row.causal else "dense"]:
            figures = list(map(int, cells[5:]))
            return dict(zip(_NAMES, figures[:4] if which == "forward" else figures[4:], strict=True))
    raise KeyError(row)


def best_peer(row, which, cudnn):
    """(name, TFLOP/s) of the best peer: its ratio to cuDNN in that table, times cuDNN's rate of this run."""
    there = elsewhere(row, which)
    name = max(there, key=there.get)
    return name, cudnn * there[name] / there["cuDNN"]
