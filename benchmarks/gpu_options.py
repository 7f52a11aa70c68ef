"""The options of bench.py gpu (shapes.GPU_OPTIONS): what softcap, ALiBi, mask and bias tensors, dropout and their mixes leave of
the speed without, forward and backward, and how fast torch's backends are with the same.

Ours are flashgqa.attention and the backward of flashgqa.torch.attention, which makes the gradient of a bias where the bias asks
for one. The peers get K and V repeated to all query heads beforehand, since not all of them know groups; ALiBi is a bias to them,
in bfloat16, and all tensors that are added come as one. Peers are cuDNN, FlashAttention-2 where dropout is all that is asked, and
where neither takes a pass, the memory-efficient backend; not all rows are compared (OptionRow.compared). A row's first group of
query heads is held against the same call in float32 before, which other kernels serve, and a peer without dropout against ours.
"""
import time
import warnings

import counting
import peers
import shapes
from timing import in_turn

TOLERANCE, TOLERANCE_OF_PEERS = 2e-2, 0.1     # the latter only tells whether they do the same: ALiBi in bfloat16 is coarse
DROPOUT, SEED = 0.1, 7


def arguments(row, device="cuda"):
    """What flashgqa.attention takes for the options of a row, and what scaled_dot_product_attention takes for the same; None if
    there is nothing."""
    import torch
    torch.manual_seed(1)
    dtype, square = getattr(torch, row.dtype), (row.s, row.s)
    ours, added, mask = {}, [], None
    if "softcap" in row.what:
        ours["softcap"] = 30.0
    if "ALiBi" in row.what:
        slopes = ours["alibi_slopes"] = 2.0 ** -torch.linspace(8 / row.hq, 8, row.hq, device=device)
        position = torch.arange(row.s, device=device)
        added.append((-slopes[:, None, None] * (position[:, None] - position).abs())[None].to(dtype))
    if "bias" in row.what or "float32 bias" in row.what:
        ours["bias"] = torch.randn(1, row.hq, *square, device=device, dtype=dtype if "bias" in row.what else torch.float32)
        added.append(ours["bias"])
    if "mask" in row.what:
        mask = ours["mask"] = torch.rand(row.b, 1, *square, device=device) < 0.9
    if "padding" in row.what:
        lengths = torch.linspace(row.s // 2, row.s, row.b, device=device)
        mask = ours["mask"] = (torch.arange(row.s, device=device) < lengths[:, None])[:, None, None]
    if "dropout" in row.what:
        ours |= {"dropout_p": DROPOUT, "seed": SEED}
    if "softcap" in row.what or "float32 bias" in row.what:
        return ours, None
    theirs = {"dropout_p": ours.get("dropout_p", 0.0), "attn_mask": sum(added[1:], added[0]) if added else mask}
    if added and mask is not None:
        theirs["attn_mask"] = theirs["attn_mask"].masked_fill(~mask, float("-inf"))
    if "its gradient" in row.what:
        theirs["attn_mask"] = theirs["attn_mask"].detach().requires_grad_()
    return ours, theirs


def own_calls(row, q, k, v, dout, options):
    import torch

    import flashgqa
    import flashgqa.torch
    leaves, given = [x.detach().requires_grad_() for x in (q, k, v)], dict(options)
    wanted = list(leaves)
    if "its gradient" in row.what:
        given["bias"] = options["bias"].detach().requires_grad_()
        wanted.append(given["bias"])
    out = flashgqa.torch.attention(*leaves, **given)
    return lambda: flashgqa.attention(q, k, v, **options), lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def first_group(row, q, k, v, dout, options):
    """The same call in float32 of the first sequence's first KV head and its query heads, whose dropout is the same."""
    group = row.hq // row.hk
    options = dict(options)
    for name in {"bias", "mask"} & set(options):
        x = options[name][:1, :group]
        options[name] = x.float() if x.is_floating_point() else x
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"][:group]
    q, k, v, dout = (x[:1, :heads].float() for x, heads in ((q, group), (k, 1), (v, 1), (dout, group)))
    return own_calls(row._replace(what=()), q, k, v, dout, options)


def rivals(row, inputs, theirs):
    """{backend: its call} of each pass; what a backend refuses is not there."""
    if theirs is None or not row.compared:
        return {}, {}
    from torch.nn.attention import SDPBackend
    q, k, v, dout = inputs
    k, v = (x.repeat_interleave(row.hq // row.hk, 1) for x in (k, v))
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION}
    passes = {}, {}
    for name, backend in backends.items():
        if name == "efficient" and all(passes):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")         # why a backend does not serve the call
                calls = peers.Sdpa(backend, **theirs).calls(row, q, k, v, dout)
        except RuntimeError:
            continue
        for of_pass, call in zip(passes, calls, strict=True):
            try:
                call()
            except RuntimeError:
                continue
            of_pass[name] = call
    for of_pass in passes:
        if len(of_pass) > 1:
            of_pass.pop("efficient", None)
    return passes


def measure(row, which, rounds):
    """The records of a row's passes."""
    inputs = peers.tensors(row)
    options, theirs = arguments(row)
    own, exact, others = own_calls(row, *inputs, options), first_group(row, *inputs, options), rivals(row, inputs, theirs)
    for n, one in enumerate(("forward", "backward")):
        if one not in which or one not in row.passes:
            continue
        got, want = ([call] if n == 0 else call[:3] for call in (own[n](), exact[n]()))
        error = peers.difference([x[:1, :y.shape[1]] for x, y in zip(got, want, strict=True)], want)
        if not error < TOLERANCE:
            raise RuntimeError(f"{one}: relative difference {error:.3g} to float32; not timed")
        for name, call in others[n].items() if "dropout" not in row.what else ():
            result = call()
            apart = peers.difference([result if n == 0 else result[0]], got[:1])
            if not apart < TOLERANCE_OF_PEERS:
                raise RuntimeError(f"{one}: relative difference of {name} {apart:.3g}; not timed")
        del got, want
        times = in_turn({"flashgqa": own[n], **others[n]}, rounds)
        work = counting.flops(row, one) / 1e12
        rates = {f"{name}_tflops": work / t for name, t in times.items()}
        yield dict(row._asdict(), what=row.name, which=one, difference=error, **rates)


def show(record, row):
    rates = "   ".join(f"{name} {record[f'{name}_tflops']:5.0f}" for name in ("cudnn", "fa2", "efficient")
                       if f"{name}_tflops" in record)
    print(f"{row.label:80s} {record['which']:8s} {record['flashgqa_tflops']:5.0f} TFLOP/s   {rates}", flush=True)


def run(options, rounds):
    """Records of the rows that the options name."""
    import torch
    records, start = [], time.perf_counter()
    for row in shapes.GPU_OPTIONS:
        if options.rows in row.label and row.dtype in options.dtype:
            try:
                for record in measure(row, options.which, rounds):
                    records.append(record)
                    show(record, row)
            except (RuntimeError, NotImplementedError, ValueError) as error:       # the other rows stand
                records.append(dict(row._asdict(), what=row.name, error=str(error)[:200]))
                print(f"{row.label}: {error}", flush=True)
    torch.cuda.empty_cache()
    print(f"options: {time.perf_counter() - start:.0f} s", flush=True)
    return records
