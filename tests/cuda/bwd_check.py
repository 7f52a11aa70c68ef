"""The backward rows of kernels.def against the equations in float64, without the Python extension: python bwd_check.py LIB [test|repeat|time]."""
import ctypes, math, statistics, sys, time
import numpy as np
import torch

LIB = ctypes.CDLL(sys.argv[1])
LIB.shim_name.restype = LIB.shim_problem.restype = ctypes.c_char_p
LIB.shim_workspace.restype = ctypes.c_int64
LIB.shim_workspace.argtypes = [ctypes.c_int, ctypes.c_int]
LIB.shim_run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
I64, F64 = ctypes.c_int64, ctypes.c_double
LIB.shim_problem.argtypes = [ctypes.c_void_p, ctypes.c_int, I64, I64, ctypes.c_int, I64, F64, F64, F64, I64, I64, ctypes.c_int, I64, I64, ctypes.c_int, ctypes.c_int]
ROWS = {LIB.shim_name(n).decode(): n for n in range(LIB.shim_rows())}
ARGS = "q k v mask bias alibi_slopes sink q_lens kv_lens cu_seqlens_q cu_seqlens_kv seed rows dout dlse out lse dq dk dv dbias dsink weights".split()
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 5, torch.int32: 6, torch.int64: 7}
NAME = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
DEV = "cuda"


def describe(t, o):
    flat = np.zeros((len(ARGS), 11), np.int64)
    flat[:, 2] = -1
    for n, a in enumerate(ARGS):
        x = t.get(a)
        if x is None: continue
        flat[n, 0], flat[n, 1], flat[n, 2] = x.data_ptr(), DTYPES[x.dtype], x.dim()
        flat[n, 3:3 + x.dim()] = x.shape
        flat[n, 7:7 + x.dim()] = x.stride()
    left, right = o.get("window", (None, None))
    message = LIB.shim_problem(flat.ctypes.data, int(o.get("causal", False)), -1 if left is None else left, -1 if right is None else right,
                               int(o.get("top_left", False)), o.get("chunk", 0), o.get("scale", 0.0), o.get("softcap", 0.0), o.get("p", 0.0),
                               o.get("seed", 0), o.get("offset", 0), int(o.get("bshd", False)), o.get("max_q", -1), o.get("max_kv", -1), int("bias" in t), int("sink" in t))
    if message: raise ValueError(message.decode())


def launch(row, splits, workspace):
    error = LIB.shim_run(row, splits, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)
    if error: raise RuntimeError(f"CUDA error {error}")


def philox(seed, offset, b, h, sq, sk):
    """uint16 halves [b, h, sq, sk]"""
    blocks = (sk + 7) // 8
    kb, i, bh = np.meshgrid(np.arange(blocks), np.arange(sq), np.arange(b * h), indexing="ij")
    x = [kb.astype(np.uint64), i.astype(np.uint64), bh.astype(np.uint64), np.full(kb.shape, offset, np.uint64)]
    k0, k1, low = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, c = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(c >> np.uint64(32)) ^ x[1] ^ np.uint64(k0), c & low, (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    halves = np.stack([w >> np.uint64(s) & np.uint64(0xFFFF) for w in x for s in (0, 16)], 1)      # [blocks, 8, sq, b*h]
    return halves.reshape(blocks * 8, sq, b, h).transpose(2, 3, 1, 0)[..., :sk].astype(np.int64)


def visible(o, sq, sk, dev):
    i, j = torch.arange(sq, device=dev)[:, None], torch.arange(sk, device=dev)[None]
    d = i + (0 if o.get("top_left") else sk - sq)
    left, right = o.get("window", (None, None))
    if o.get("causal"): right = 0 if right is None else min(right, 0)
    see = torch.ones(sq, sk, dtype=torch.bool, device=dev)
    if left is not None: see &= j >= d - left
    if right is not None: see &= j <= d + right
    if o.get("chunk"): see &= torch.div(j, o["chunk"], rounding_mode="floor") == torch.div(d, o["chunk"], rounding_mode="floor")
    return see, (d - j).abs()


def equations(t, o, b, sq, sk, dtype=None, given=None):
    """One sequence, tensors [h, s, d]. dtype: round like a computation in it would. Returns out, lse, grads (float64)."""
    r = (lambda x: x.to(dtype).double()) if dtype else (lambda x: x.double())
    q, k, v, do = (t[n].double() for n in ("q", "k", "v", "dout"))
    hq, g = q.shape[0], q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(g, 0), v.repeat_interleave(g, 0)
    see, dist = visible(o, sq, sk, q.device)
    see = see.expand(hq, sq, sk)
    if t.get("mask") is not None: see = see & t["mask"]
    if t.get("bias") is not None: see = see & (t["bias"] != -math.inf)
    any_row = see.any(-1)
    clean = lambda x: torch.where(torch.isfinite(x), x, 0.0)
    k, v = clean(k), clean(v)          # tests only put NaN where nobody looks
    scale = o.get("scale", 0.0) or q.shape[-1] ** -0.5
    s = r(r(q @ k.mT) * scale)
    x, slope = s, 1.0
    if o.get("softcap"):
        x = r(o["softcap"] * torch.tanh(s / o["softcap"]))
        slope = 1 - (x / o["softcap"]) ** 2
    if t.get("bias") is not None: x = r(x + clean(t["bias"].double()))
    if t.get("alibi_slopes") is not None: x = r(x - t["alibi_slopes"].double()[:, None, None] * dist)
    x = torch.where(see, x, -math.inf)
    logits = x
    if t.get("sink") is not None: logits = torch.cat([x, t["sink"].double()[:, None, None].expand(hq, sq, 1)], -1)
    lse = torch.logsumexp(logits, -1)
    if given is not None: lse = given["lse"].double()
    safe = torch.where(lse == -math.inf, 0.0, lse)
    p = r(torch.where(see, torch.exp(x - safe[..., None]), 0.0))
    keep = 1.0
    if o.get("p"):
        threshold = round(65536 * o["p"])
        keep = (t["halves"] >= threshold).double() * (0.0 if threshold == 65536 else 65536 / max(1, 65536 - threshold))
    pd = r(p * keep)
    out = r(pd @ v)
    if given is not None: out = given["out"].double()
    delta = r((do * out).sum(-1))
    if t.get("dlse") is not None: delta = delta - torch.where(lse == -math.inf, 0.0, t["dlse"].double())
    dsx = r(torch.where(see, p * (r(r(do @ v.mT) * keep) - delta[..., None]), 0.0))
    ds = r(dsx * slope)
    fold = lambda x: r(x).reshape(x.shape[0] // g, g, *x.shape[1:]).sum(1)
    grads = {"dq": r(ds @ k * scale), "dk": r(fold(ds.mT @ q * scale)), "dv": r(fold(pd.mT @ do)), "dbias": dsx}
    if t.get("sink") is not None: grads["dsink"] = -(torch.exp(t["sink"].double()[:, None] - safe) * (lse != -math.inf) * delta).sum(-1)
    return out, lse, grads


def run_case(c, row_name=None, repeats=1, quiet=False):
    dtype, (b, hq, hk, sq, sk, d, dv), o = c["dtype"], c["shape"], dict(c.get("o", {}))
    gen = torch.Generator(DEV).manual_seed(hash(str(c)) % 1000)
    rnd = lambda *s: torch.randn(*s, generator=gen, device=DEV)
    varlen, strided = c.get("varlen"), c.get("strided")
    t = {}
    if varlen:
        lq, lk = varlen
        b, cq, ck = len(lq), [0, *np.cumsum(lq)], [0, *np.cumsum(lk)]
        t["cu_seqlens_q"], t["cu_seqlens_kv"] = (torch.tensor(np.array(x), dtype=torch.int32, device=DEV) for x in (cq, ck))
        sq, sk = max(lq), max(lk)
        nq, nk = int(cq[-1]) + c.get("tail", 0), int(ck[-1]) + c.get("tail", 0)
        if c.get("tail"): pass
        mk = lambda n, h, w: rnd(n, h, w).to(dtype)
        t["q"], t["k"], t["v"], t["dout"] = mk(nq, hq, d), mk(nk, hk, d), mk(nk, hk, dv), mk(nq, hq, dv)
    else:
        def mk(h, s, w):
            if strided: return rnd(s, b, h, w + strided).to(dtype)[..., :w].permute(1, 2, 0, 3)
            return rnd(b, s, h, w).to(dtype).transpose(1, 2) if c.get("bshd") else rnd(b, h, s, w).to(dtype)
        t["q"], t["k"], t["v"], t["dout"] = mk(hq, sq, d), mk(hk, sk, d), mk(hk, sk, dv), mk(hq, sq, dv)
    if c.get("qscale"): t["q"] = t["q"] * c["qscale"]
    for n in ("q_lens", "kv_lens"):
        if n in c: t[n] = torch.tensor(c[n], dtype=torch.int32, device=DEV)
    if "mask" in c: t["mask"] = torch.rand(*c["mask"], generator=gen, device=DEV) > 0.3
    if "bias" in c:
        t["bias"] = rnd(*c["bias"]).to(c.get("bias_dtype", dtype))
        if c.get("bias_inf"): t["bias"][..., ::3] = -math.inf
    if c.get("alibi"): t["alibi_slopes"] = torch.rand(hq, generator=gen, device=DEV) * 0.5
    if c.get("sink"): t["sink"] = rnd(hq).to(c.get("sink_dtype", torch.float32))
    if o.get("p"): halves = torch.from_numpy(philox(o["seed"], o.get("offset", 0), b, hq, sq, sk)).to(DEV)

    # sequences
    seqs = []
    for n in range(b):
        a = {}
        if varlen:
            rq, rk = slice(int(cq[n]), int(cq[n + 1])), slice(int(ck[n]), int(ck[n + 1]))
            a = {"q": t["q"][rq].transpose(0, 1), "k": t["k"][rk].transpose(0, 1), "v": t["v"][rk].transpose(0, 1), "dout": t["dout"][rq].transpose(0, 1)}
            ls, lk_ = lq[n], lk[n]
        else:
            ls, lk_ = c["q_lens"][n] if "q_lens" in c else sq, c["kv_lens"][n] if "kv_lens" in c else sk
            a = {"q": t["q"][n, :, :ls], "k": t["k"][n, :, :lk_], "v": t["v"][n, :, :lk_], "dout": t["dout"][n, :, :ls]}
        for m in ("mask", "bias"):
            if m in t: a[m] = t[m].expand(b, hq, sq, sk)[n, :, :ls, :lk_]
        for m in ("alibi_slopes", "sink"):
            if m in t: a[m] = t[m]
        if o.get("p"): a["halves"] = halves[n, :, :ls, :lk_]
        seqs.append((a, ls, lk_))
    if c.get("poison"):                # NaN in keys that nobody sees, and in padding
        for n, (a, ls, lk_) in enumerate(seqs):
            see = visible(o, ls, lk_, DEV)[0]
            if "mask" in a: see = (see & a["mask"]).any(0)
            dead = ~see.any(0)
            a["k"][:, dead], a["v"][:, dead] = math.nan, math.nan
            if not varlen: t["k"][n, :, lk_:], t["v"][n, :, lk_:], t["q"][n, :, ls:], t["dout"][n, :, ls:] = (math.nan,) * 4
    lead = t["q"].shape[:-1]
    rows = (hq, lead[0]) if varlen else lead
    out, lse = torch.zeros_like(t["dout"]), torch.full(rows, -math.inf, device=DEV)
    if c.get("dlse"): t["dlse"] = rnd(*rows)
    ref, base = [], []
    for n, (a, ls, lk_) in enumerate(seqs):
        view = (lambda x: x[slice(int(cq[n]), int(cq[n + 1]))].transpose(0, 1)) if varlen else (lambda x: x[n, :, :ls])
        lview = (lambda x: x[:, int(cq[n]):int(cq[n + 1])]) if varlen else (lambda x: x[n, :, :ls])
        if c.get("dlse"): a["dlse"] = lview(t["dlse"])
        oo, ll, _ = equations(a, o, n, ls, lk_)
        view(out).copy_(torch.where((ll == -math.inf)[..., None], 0.0, oo))
        lview(lse).copy_(ll)
        given = {"out": view(out), "lse": lview(lse)}
        ref.append(equations(a, o, n, ls, lk_)[2])
        base.append(equations(a, o, n, ls, lk_, dtype=dtype, given=given)[2])
    t["out"], t["lse"] = out, lse
    like = lambda x: torch.full_like(x, math.nan)
    t["dq"], t["dk"], t["dv"] = like(t["q"]), like(t["k"]), like(t["v"])
    if "bias" in t: t["dbias"] = torch.full_like(t["bias"], math.nan)
    if "sink" in t: t["dsink"] = torch.full_like(t["sink"], math.nan)
    o["bshd"] = False
    describe(t, o)
    width = next(w for w in (64, 128, 256) if max(d, dv) <= w)
    general = any(n in c for n in ("mask", "bias", "alibi", "strided")) or o.get("softcap") or o.get("p") or d % 8 or dv % 8 or c.get("general") or dtype == torch.float32
    row = ROWS[f"{NAME[dtype]} {width} {'general' if general else 'plain'}"]
    splits = c.get("splits", 1)
    workspace = torch.full((max(1, LIB.shim_workspace(row, splits)),), 255, dtype=torch.uint8, device=DEV)
    first = None
    names = [n for n in ("dq", "dk", "dv", "dbias", "dsink") if n in t]
    for n in range(repeats):
        for m in names: t[m].fill_(math.nan)
        if n: workspace.fill_(255)
        launch(row, splits, workspace)
        torch.cuda.synchronize()
        got = {m: t[m].clone() for m in names}
        if first is None: first = got
        elif any(not torch.equal(first[m].view(torch.uint8), got[m].view(torch.uint8)) for m in names): return "bits change", 0
    worst, bad = 0.0, []
    for m in names:
        if m in ("dbias", "dsink"):
            if m == "dsink":
                want, naive = sum(x[m] for x in ref), sum(x[m] for x in base)
            else:
                shape = t["bias"].shape
                def full(parts):
                    z = torch.zeros(b, hq, sq, sk, dtype=torch.float64, device=DEV)
                    for n, (a, ls, lk_) in enumerate(seqs): z[n, :, :ls, :lk_] = parts[n]["dbias"]
                    for k in range(4):
                        if shape[k] == 1 and z.shape[k] != 1: z = z.sum(k, keepdim=True)
                    return z
                want, naive = full(ref), full([{"dbias": x["dbias"]} for x in base])
            pairs = [(t[m], want, naive)]
        else:
            pairs, rest = [], torch.ones(t[m].shape[:-1], dtype=torch.bool, device=DEV)
            for n, (a, ls, lk_) in enumerate(seqs):
                if varlen:
                    cut = slice(int(cq[n]), int(cq[n + 1])) if m == "dq" else slice(int(ck[n]), int(ck[n + 1]))
                    pairs.append((t[m][cut].transpose(0, 1), ref[n][m], base[n][m])); rest[cut] = False
                else:
                    pairs.append((t[m][n, :, :ls if m == "dq" else lk_], ref[n][m], base[n][m])); rest[n, :, :ls if m == "dq" else lk_] = False
            if not (t[m][rest] == 0).all(): bad.append(f"{m} padding not 0")
        if not pairs: continue
        eps = torch.finfo(t[m].dtype).eps
        top = max((w.abs().max().item() for _, w, _ in pairs if w.numel()), default=0.0)
        err = max(((g.double() - w).abs().max().item() if torch.isfinite(g).all() else math.inf for g, w, _ in pairs if w.numel()), default=0.0)
        naive = max(((x.to(t[m].dtype).double() - w).abs().max().item() for _, w, x in pairs if w.numel()), default=0.0)
        bound = (4 if dtype == torch.float32 else 3) * naive + 2 * eps * top + (5e-6 if dtype != torch.float32 else 1e-7 + 1e-5 * (m == "dbias"))
        worst = max(worst, err / bound)
        if not err <= bound: bad.append(f"{m} err {err:.3g} bound {bound:.3g} top {top:.3g}")
    return "; ".join(bad), worst


def cases():
    B, H, F = torch.bfloat16, torch.float16, torch.float32
    out = []
    def add(dtype, shape, **c):
        o = {k: c.pop(k) for k in list(c) if k in ("causal", "window", "top_left", "chunk", "scale", "softcap", "p", "seed", "offset", "max_q", "max_kv")}
        out.append({"dtype": dtype, "shape": shape, "o": o, **c})
    for dt in (B, H, F):
        for d in (64, 128, 256):
            add(dt, (2, 4, 2, 200, 200, d, d))
            add(dt, (1, 4, 1, 300, 333, d, d), causal=True)
            add(dt, (2, 2, 2, 129, 70, d, d), causal=True)
            add(dt, (1, 8, 2, 513, 513, d, d), causal=True, window=(100, 0), splits=2)
        add(dt, (1, 4, 2, 260, 260, 128, 128), general=1, causal=True)
    for d, dv in ((64, 128), (40, 24), (128, 64), (256, 136), (72, 200), (8, 8)): add(B, (2, 4, 2, 130, 190, d, dv), causal=True)
    for d, dv in ((1, 3), (33, 65), (100, 100), (255, 127)): add(B, (1, 4, 2, 130, 140, d, dv)); add(F, (1, 2, 1, 70, 90, d, dv))
    for s in (1, 2, 63, 64, 65, 127, 129, 1000): add(B, (1, 2, 1, s, s, 128, 128), causal=True); add(H, (1, 2, 2, 1, s, 64, 64)); add(B, (1, 2, 1, s, 3, 64, 64), causal=True)
    for general in (0, 1):
        x = {"general": 1} if general else {}
        add(B, (1, 4, 2, 400, 400, 128, 128), window=(64, 32), **x)
        add(B, (1, 4, 2, 400, 300, 64, 64), window=(0, 0), **x)
        add(B, (1, 4, 2, 300, 400, 128, 128), chunk=96, causal=True, **x)
        add(B, (1, 4, 2, 300, 400, 128, 128), top_left=True, causal=True, poison=1, **x)
        add(H, (1, 4, 2, 500, 100, 128, 128), top_left=True, window=(30, 3), **x)
        add(B, (3, 4, 2, 200, 260, 128, 128), q_lens=[200, 0, 77], kv_lens=[13, 100, 260], causal=True, poison=1, dlse=1, **x)
        add(B, (3, 4, 2, 200, 260, 64, 64), kv_lens=[0, 1, 200], poison=1, sink=1, dlse=1, **x)
        add(B, (0, 6, 2, 0, 0, 128, 128), varlen=([5, 300, 0, 64, 129], [7, 250, 10, 0, 129]), causal=True, **x)
        add(H, (0, 6, 2, 0, 0, 64, 64), varlen=([500, 300, 40], [500, 300, 40]), causal=True, tail=9, splits=2, sink=1, dlse=1, **x)
        add(B, (1, 8, 1, 700, 700, 128, 128), causal=True, splits=4, **x)
        add(B, (1, 1, 1, 700, 700, 128, 128), splits=4, **x)
        add(B, (1, 3, 1, 300, 700, 64, 64), splits=3, causal=True, bshd=1, **x)
        add(B, (2, 4, 4, 256, 256, 128, 128), qscale=30.0, causal=True, **x)
    for dt in (B, H, F):
        d = 64 if dt != B else 128
        add(dt, (2, 4, 2, 150, 170, d, d), softcap=5.0, causal=True)
        add(dt, (2, 4, 2, 150, 170, d, d), p=0.3, seed=(1 << 40) + 12345, offset=7)
        add(dt, (2, 4, 2, 150, 170, d, d), alibi=1, causal=True, sink=1)
        add(dt, (2, 4, 2, 150, 170, d, d), mask=(2, 1, 150, 170), poison=1)
        add(dt, (2, 4, 2, 150, 170, d, d), mask=(2, 1, 1, 170), dlse=1)
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(2, 4, 150, 170), p=0.2, seed=3)
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(1, 4, 150, 170), softcap=8.0)
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(1, 1, 150, 170), causal=True, bias_inf=1)
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(2, 1, 1, 170), bias_dtype=F)
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(1, 4, 1, 1), bias_dtype=F, window=(20, 20))
        add(dt, (2, 4, 2, 150, 170, d, d), bias=(1, 1, 150, 1), bias_dtype=F)
        add(dt, (2, 4, 2, 150, 170, d, d), strided=3)
        add(dt, (2, 4, 2, 150, 170, d, d), p=1.0, seed=3)
    add(B, (2, 4, 2, 150, 170, 256, 256), softcap=5.0, p=0.2, seed=5, alibi=1, bias=(1, 4, 150, 170), mask=(2, 1, 150, 170), sink=1, dlse=1, causal=True)
    add(B, (2, 4, 2, 150, 170, 96, 80), softcap=5.0, p=0.2, seed=5, alibi=1, bias=(1, 4, 150, 170), sink=1, window=(50, 10), strided=8)
    add(B, (2, 4, 2, 0, 170, 64, 64)); add(B, (2, 4, 2, 100, 0, 64, 64)); add(B, (0, 4, 2, 100, 10, 64, 64))
    return out


def test():
    failed, top, start = 0, 0.0, time.time()
    every = cases()
    for c in every:
        try: bad, worst = run_case(c)
        except Exception as e:
            bad, worst = f"{type(e).__name__}: {str(e)[:300]}", 0
            if "CUDA error" in str(e): print("FAIL", c, bad, flush=True); raise SystemExit(1)
        top = max(top, worst)
        if bad: failed += 1; print("FAIL", str(c).replace("torch.", ""), "->", bad, flush=True)
    print(f"{len(every) - failed} passed, {failed} failed; worst error/bound {top:.2f}; {time.time() - start:.1f} s", flush=True)


def sanitize():
    """One small case for every row, for compute-sanitizer."""
    for n in ROWS:
        dtype, width, variant = n.split()
        c = {"dtype": {v: k for k, v in NAME.items()}[dtype], "shape": (1, 4, 2, 140, 150, int(width), int(width)), "o": {"causal": True}, "splits": 2, "sink": 1}
        if variant == "general": c.update(general=1, bias=(1, 4, 140, 150), o={"causal": True, "p": 0.2, "seed": 1, "softcap": 9.0})
        print(n, run_case(c), flush=True)


def repeat(n=200):
    B = torch.bfloat16
    for c in ({"dtype": B, "shape": (60, 8, 2, 400, 400, 128, 128), "o": {"causal": True}}, {"dtype": B, "shape": (60, 4, 1, 300, 300, 64, 64)},
              {"dtype": B, "shape": (60, 4, 2, 300, 300, 128, 128), "general": 1, "splits": 2}, {"dtype": torch.float32, "shape": (20, 4, 2, 200, 200, 64, 64)}):
        print("repeat", n, str(c).replace("torch.", ""), run_case(c, repeats=n), flush=True)


def clock(f, n=12):
    for _ in range(3): f()
    ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda._sleep(1_000_000)
        a.record(); f(); b.record(); b.synchronize()
        ts.append(a.elapsed_time(b))
    return statistics.median(ts) * 1e-3


def timing(quick=False):
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel, SDPBackend
    print(torch.cuda.get_device_name(), torch.__version__)
    x = torch.randn(8192, 8192, device=DEV, dtype=torch.bfloat16)
    t = clock(lambda: x @ x); print(f"matmul {2 * 8192**3 / t / 1e12:.0f} TFLOP/s")
    del x
    B = torch.bfloat16
    for hq, hk, d in ((16, 16, 128), (32, 8, 128), (64, 8, 128), (32, 1, 128), (32, 8, 64), (16, 4, 256)):
        for causal in (False, True):
            for s in (1024, 4096, 16384):
                if quick and (s == 16384 or (hq, hk, d) == (64, 8, 128) or (s == 1024 and (d != 128 or hk == 1))): continue
                b = 16384 // s
                mk = lambda h: torch.randn(b, s, h, d, device=DEV, dtype=B).transpose(1, 2)
                q, k, v, do = mk(hq), mk(hk), mk(hk), mk(hq)
                qg, kg, vg = (x.detach().requires_grad_() for x in (q, k, v))
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION): o = F.scaled_dot_product_attention(qg, kg, vg, is_causal=causal, enable_gqa=hq != hk)
                fa2 = clock(lambda: torch.autograd.grad(o, (qg, kg, vg), do, retain_graph=True))
                want = torch.autograd.grad(o, (qg, kg, vg), do, retain_graph=True)
                kx = k.repeat_interleave(hq // hk, 1)
                vx = v.repeat_interleave(hq // hk, 1)
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, kx, vx, 0.0, causal)[:2]
                del kx, vx
                t = {"q": q, "k": k, "v": v, "dout": do, "out": out, "lse": lse[..., :s].contiguous(), "dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
                describe(t, {"causal": causal})
                flops = 2.5 * 4 * b * hq * s * s * d * (0.5 if causal else 1)
                line = f"{hq},{hk},{d} s {s} {'causal' if causal else 'full'}: fa2 {flops / fa2 / 1e12:.0f}"
                row = ROWS[f"bf16 {d} plain"]
                bk = 64 if d == 256 else 128
                items = b * hk * s // bk
                for splits in ((1, 2, 4) if items < 4 * 132 else (1,)):
                    w = torch.empty(LIB.shim_workspace(row, splits), dtype=torch.uint8, device=DEV)
                    mine = clock(lambda: launch(row, splits, w))
                    err = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip((t["dq"], t["dk"], t["dv"]), want))
                    line += f"  ours/{splits} {flops / mine / 1e12:.0f} ({fa2 / mine:.2f}x, diff {err:.1e})"
                    del w
                print(line, flush=True)


def one(b=2, hq=32, hk=8, s=4096, d=128):
    """One launch, for profilers."""
    mk = lambda h: torch.randn(b, s, h, d, device=DEV, dtype=torch.bfloat16).transpose(1, 2)
    q, k, v, do = mk(hq), mk(hk), mk(hk), mk(hq)
    t = {"q": q, "k": k, "v": v, "dout": do, "out": torch.zeros_like(q), "lse": torch.full((b, hq, s), math.log(s) + 0.5, device=DEV),
         "dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    describe(t, {})
    w = torch.empty(LIB.shim_workspace(ROWS[f"bf16 {d} plain"], 1), dtype=torch.uint8, device=DEV)
    launch(ROWS[f"bf16 {d} plain"], 1, w)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for what in sys.argv[2:]:
        if what == "rows": print({n: LIB.shim_smem(k) for n, k in ROWS.items()})
        if what == "test": test()
        if what == "repeat": repeat()
        if what == "time": timing()
        if what == "quick": timing(True)
        if what == "one": one()
        if what == "sanitize": sanitize()
