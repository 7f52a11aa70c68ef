"""Blocks that wait for each other to join their parts of the keys, in 100,000 launches a way of joining, beside a stream that
keeps the multiprocessors busy: none hangs, and every result has the same bits."""

import pytest
import torch
from test_decode_cuda import ROWS, inputs, int32

import flashgqa

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
EAGER, RECORDED, REPLAYS, BURST = 20_000, 100, 800, 10
# b, hk, g, sq, sk, options, the row by which the plan has to end
CALLS = {
    "clusters": (1, 8, 4, 1, 1024, {}, "decode"),
    "clusters of wide rows": (1, 1, 32, 1, 1024, {}, "decodewide"),
    "clusters, lengths on the device": (2, 2, 4, 1, 1024, {"lens": (1000, 77)}, "decode"),
    "records": (1, 1, 4, 1, 40000, {}, "decode"),
    "records of wide rows": (1, 1, 32, 1, 40000, {}, "decodewide"),
    "records of chunks": (3, 1, 16, 1, 5000, {"batch_invariant": True}, "decodewide"),
    "two blocks": (66, 1, 32, 1, 512, {}, "decodewide"),
    "two blocks of more rows": (66, 1, 32, 2, 512, {"forced": True}, "decodewide"),
    "float8": (1, 2, 4, 1, 8192, {"float8": True}, "decodef8"),
    "tiles": (1, 1, 32, 4, 16384, {"forced": True}, "plain"),
    "two tiles": (33, 1, 32, 4, 1024, {}, "plain"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_hang_and_no_wrong_bit(name):
    b, hk, g, sq, sk, options, row = CALLS[name]
    q, k, v = inputs(b, hk, g, sq, sk)
    call = {key: x for key, x in options.items() if key == "batch_invariant"}
    if "lens" in options:
        call["kv_lens"] = int32(options["lens"])
    if "forced" in options:
        call["kernel"] = f"fwd_sm90_bf16_d128_dv128_{row}"
    function, explain = flashgqa.attention, flashgqa.explain
    if "float8" in options:
        function, explain = flashgqa.attention_with_kvcache, flashgqa.explain_with_kvcache
        k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        call["cache_lens"] = sk
    plan = explain(q, k, v, **call)
    assert plan["kernel"].endswith(row) and (row != "plain" or plan["splits"] > 1)
    expected = function(q, k, v, **call)
    outs, wrong = torch.empty(BURST, *q.shape, device="cuda", dtype=q.dtype), torch.zeros((), dtype=torch.int64, device="cuda")

    def burst():
        """Launches that follow each other, so that those which may do begin before the one ahead has ended."""
        outs.fill_(torch.nan)
        for out in outs:
            function(q, k, v, out=out, **call)
        wrong.add_((outs != expected).sum())

    busy = torch.randn(2048, 2048, device="cuda", dtype=q.dtype)
    side, own, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=own):
        for _ in range(RECORDED // BURST):
            burst()
    with torch.cuda.stream(own):
        for n in range(EAGER // BURST + REPLAYS):
            with torch.cuda.stream(side):
                for _ in range(1 if n < EAGER // BURST else 10):
                    torch.mm(busy, busy)
            burst() if n < EAGER // BURST else graph.replay()
    torch.cuda.synchronize()
    assert wrong.item() == 0
    outs[0, 0, 0, 0, 0] += 1
    assert (outs != expected).sum() == 1
