"""Host time of a call: how long Python is busy until the work is given to the device, not how long that works.

    python benchmarks/host.py [cpu|cuda]       cuda where there is one

Tensors 1 x 8 x 16 x 64 bfloat16 (on the CPU one row and key of one head instead, so that hardly anything is computed: the way of
a call is the same). Microseconds a call, the best of 12 times 200 calls behind which the device has nothing to do. Beside ours:
torch's scaled_dot_product_attention, an empty autograd Function, which is what torch itself takes for a node, and what no call
on a GPU can do without: memory for a result (empty_like) and a launch (of a kernel that sleeps for 0 cycles).
"""
import sys
import time

import torch

import flashgqa
import flashgqa.torch as fgt

ROUNDS, CALLS = 12, 200


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.view_as(q)

    @staticmethod
    def backward(ctx, dout):
        return ctx.saved_tensors


def best(call, device):
    """Microseconds. The pause lets the device catch up: a full queue would be waited for."""
    for _ in range(20):
        call()
    times = []
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / CALLS * 1e6


def calls(device):
    """(name, call) of everything that is timed."""
    shape = (1, 8, 16, 64) if device == "cuda" else (1, 1, 1, 64)
    q, k, v = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.ones_like(q)
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    return [
        ("flashgqa.attention", lambda: flashgqa.attention(q, k, v)),
        ("flashgqa.attention causal, lse", lambda: flashgqa.attention(q, k, v, causal=True, return_lse=True)),
        ("flashgqa.attention_backward", lambda: flashgqa.attention_backward(dout, q, k, v, out, lse)),
        ("flashgqa.torch.attention, no grad", lambda: fgt.attention(q, k, v)),
        ("flashgqa.torch.attention, grad", lambda: fgt.attention(*leaves)),
        ("flashgqa.torch.attention, forward + backward", both(fgt.attention)),
        ("torch sdpa, no grad", lambda: sdpa(q, k, v)),
        ("torch sdpa, grad", lambda: sdpa(*leaves)),
        ("torch sdpa, forward + backward", both(sdpa)),
        ("empty Function, grad", lambda: Empty.apply(*leaves)),
        ("empty Function, forward + backward", both(Empty.apply)),
        ("torch.empty_like", lambda: torch.empty_like(q)),
        *([("torch.cuda._sleep(0)", lambda: torch.cuda._sleep(0))] if device == "cuda" else []),
    ]


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, flashgqa {flashgqa.__version__}: microseconds a call")
    flashgqa.set_num_threads(1)
    torch.set_num_threads(1)
    for name, call in calls(device):
        print(f"{name:46s} {best(call, device):7.2f}", flush=True)


if __name__ == "__main__":
    main()
