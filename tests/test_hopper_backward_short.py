"""The backward of short sequences on Hopper (csrc/cuda/sm90/bwd_short.cu): which calls it serves, and against the float64 oracle
all that makes a difference to a block that has a head of a sequence whole: lengths, masks, elements that are not finite."""

import itertools

import pytest
import torch
from test_hopper import DTYPES, inputs, random, row_for
from test_hopper_backward import SHORT
from test_hopper_poison import exact, gradients, ints

import flashgqa
from flashgqa import reference

pytestmark = pytest.mark.skipif(not SHORT, reason="needs a GPU of compute capability 9.0 and code for it")
INF, NAN = float("inf"), float("nan")
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (20, 5)}, "top-left": {"causal": True, "align": "top-left"}}
LENGTHS = [(64, 64), (128, 128), (77, 77), (1, 1), (50, 100), (100, 50), (128, 64), (64, 128), (3, 128), (127, 65)]
LONGER = [(256, 256), (197, 197), (129, 129), (256, 100), (100, 256), (255, 130), (193, 250)]
UNEQUAL = [(64, 60, 50), (64, 128, 99), (64, 200, 256), (64, 256, 200), (128, 60, 64), (128, 128, 99)]     # head dims before them
MOST = {64: 256, 128: 128}                      # rows and keys, by the head dim of the row


def options_of(mask, b, sk):
    """Of "keys" a mask tensor that all rows share; of the first sequence it shows none, of the second the last key alone."""
    if mask != "keys":
        return MASKS[mask]
    shown = random(b, 1, 1, sk, dtype=torch.float32, seed=5) > -0.5
    shown[0] = shown[1, ..., :-1] = False
    shown[1, ..., -1] = True
    return {"mask": shown}


def check(tensors, options, kernel):
    """Against the oracle, which entries are finite and their values; what was computed. Of sums that are nearly 0 roundings
    of weights and of their gradients are what is left."""
    got = gradients(tensors, options, kernel)
    for name, x, want in zip(("dq", "dk", "dv"), got, exact(tensors, options), strict=True):
        finite = want.isfinite()
        assert torch.equal(x.isfinite(), finite), (name, int(finite.sum()), int(x.isfinite().sum()))
        error, norm = (x.double() - want).where(finite, 0).norm().item(), want.where(finite, 0).norm().item()
        assert error <= 2 * torch.finfo(x.dtype).eps * (norm + 0.02 * want.numel() ** 0.5), (name, error, norm)
    return got


def short_row(dtype, d):
    return row_for(dtype, d, d, which="bwd", variant="short")


def arrays(b, h, sq, sk, d, dtype=torch.bfloat16):
    q, k, v = inputs(b, h, h, sq, sk, d, dtype=dtype)
    return {"q": q, "k": k, "v": v, "dout": random(b, h, sq, d, dtype=dtype, seed=8)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plan_takes_it_and_says_why_not(dtype):
    def kernel(b, hq, hk, sq, sk, d, **options):
        return flashgqa.explain(*inputs(b, hq, hk, sq, sk, d, dtype=dtype), backward=True, **options)["kernel"]

    for d in (8, 64, 72, 128):
        most = MOST[64 if d <= 64 else 128]
        assert kernel(8, 4, 4, most, most, d, causal=True) == short_row(dtype, d)
        for others in ((8, 4, 4, most + 1, 128, d), (8, 4, 4, 128, most + 1, d), (8, 4, 2, 128, 128, d)):
            assert not kernel(*others).endswith("short")
        per_row = torch.ones(128, 128, dtype=torch.bool, device="cuda")
        assert kernel(8, 4, 4, 128, 128, d, mask=per_row[:1]).endswith("short")
        for options in ({"mask": per_row}, {"softcap": 9.0}, {"dropout_p": 0.1, "seed": 1}, {"batch_invariant": True}):
            assert not kernel(8, 4, 4, 128, 128, d, **options).endswith("short")
    plan = flashgqa.explain(*inputs(3, 5, 5, 100, 77, 64, dtype=dtype), backward=True)
    assert plan["tasks"] == 15 and plan["workspace_bytes"] == 0


@pytest.mark.parametrize("mask", [*MASKS, "keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [40, 64, 72, 128])
def test_gradients_are_those_of_the_equations(d, dtype, mask):
    for sq, sk in LENGTHS + (LONGER if d <= 64 else []):
        check(arrays(3, 2, sq, sk, d, dtype), options_of(mask, 3, sk), short_row(dtype, d))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 128])
def test_lengths_with_nan_beyond_them(d, mask):
    for s in (60, 128, 200)[: 3 if d == 64 else 2]:
        lengths = {"q_lens": ints(s, 1, 0, s // 2), "kv_lens": ints(s // 3, s, s - 1, 0)}
        for which in (("q_lens",), ("kv_lens",), ("q_lens", "kv_lens")):
            tensors = arrays(4, 3, s, s, d)
            for x, of in zip(tensors.values(), ("q_lens", "kv_lens", "kv_lens", "q_lens"), strict=True):
                if of in which:
                    x.masked_fill_((torch.arange(s, device="cuda") >= lengths[of][:, None])[:, None, :, None], NAN)
            options = {name: lengths[name] for name in which} | MASKS[mask]
            got = gradients(tensors, options, short_row(torch.bfloat16, d))
            assert all(x.isfinite().all() for x in got)
            clean = check({name: x.nan_to_num(0.5) for name, x in tensors.items()}, options, short_row(torch.bfloat16, d))
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


def seen_pairs(options, n, sq, sk):
    """Which keys each row of sequence n sees."""
    rule = {name: x for name, x in options.items() if name in ("causal", "window", "align")}
    rows, keys = (int(options[name][n]) if name in options else most for name, most in (("q_lens", sq), ("kv_lens", sk)))
    seen = torch.zeros(sq, sk, dtype=torch.bool, device="cuda")
    seen[:rows, :keys] = torch.from_numpy(reference.visible(rows, keys, **rule))
    return seen & options["mask"][n, 0] if "mask" in options else seen


@pytest.mark.parametrize("mask", [*MASKS, "keys", "lengths"])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, sq, sk", UNEQUAL)
def test_what_is_not_finite_reaches_those_who_see_it(d, sq, sk, dtype, which, mask):
    """And changes no bit of anybody else, in the head that has it or beside it; signs of zeros in sums of nothing else, too.
    Some of the rows and keys see, or are seen by, nobody."""
    lengths = {"q_lens": ints(sq, 1, sq - 9), "kv_lens": ints(sk - 3, sk, sk - 20), "causal": True}
    options = lengths if mask == "lengths" else options_of(mask, 3, sk)
    seen = seen_pairs(options, 2, sq, sk)
    is_key = which in "kv"
    places = {0, sk // 2, *(int(seen.any(0).eq(some).int().argmax()) for some in (False, True))} if is_key else {0, sq // 2}
    for value, at in itertools.product((-INF, INF if which in ("v", "dout") else NAN), places):
        tensors = arrays(3, 3, sq, sk, d, dtype)
        if value == -INF:
            tensors = {name: -x.abs() for name, x in tensors.items()}
        clean = gradients(tensors, options, short_row(dtype, d))
        tensors[which][2, 2, at, 5] = value
        got = (gradients if value == -INF else check)(tensors, options, short_row(dtype, d))
        rows = seen[:, at] if is_key else seen.any(1) & (torch.arange(sq, device="cuda") == at)
        keys = seen[rows].any(0)
        for name, x, before, reached in zip(("dq", "dk", "dv"), got, clean, (rows, keys, keys), strict=True):
            hit = torch.zeros(x.shape[:3], dtype=torch.bool, device="cuda")
            hit[2, 2] = reached & ((which, name) != ("v", "dv"))
            assert torch.equal(x[~hit].view(torch.int16), before[~hit].view(torch.int16)), (name, value, at)


@pytest.mark.parametrize("d", [64, 128])
def test_gradient_of_the_lse_layouts_and_scales(d):
    row = short_row(torch.bfloat16, d)
    tensors = arrays(4, 3, 100, 100, d)
    options = {"causal": True, "scale": 0.3}
    out, lse = flashgqa.attention(*list(tensors.values())[:3], return_lse=True, **options)
    dlse = torch.randn(4, 3, 100, device="cuda")
    heads_inside = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    for moved in (lambda x: x, heads_inside, lambda x: torch.cat([x, x], -1)[..., :d]):
        q, k, v, dout = map(moved, tensors.values())
        got = flashgqa.attention_backward(dout, q, k, v, moved(out), lse, dlse=dlse, kernel=row, **options)[:3]
        on_cpu = [x.double().cpu() for x in (dout, q, k, v, moved(out), lse)]
        expected = flashgqa.attention_backward(*on_cpu, dlse=dlse.double().cpu(), **options)[:3]
        for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
            error = (a.double().cpu() - b).norm() / b.norm()
            assert error < 1e-2, (name, error)


@pytest.mark.parametrize("d, s", [(64, 64), (64, 128), (64, 256), (128, 64), (128, 128)])
def test_same_bits_every_time_and_in_any_batch(d, s):
    tensors = arrays(300, 12, s, s, d)
    row = short_row(torch.bfloat16, d)
    for options in ({}, {"causal": True}):
        first = gradients(tensors, options, row)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(gradients(tensors, options, row), first, strict=True))
        alone = gradients({name: x[7:8] for name, x in tensors.items()}, options, row)
        assert all(torch.equal(a[7:8], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_large_scores(mask):
    """Weights of 0 and 1, the largest score in thousands."""
    tensors = arrays(2, 3, 150, 150, 64)
    tensors["q"] *= 100.0
    got = gradients(tensors, MASKS[mask], short_row(torch.bfloat16, 64))
    for x, want in zip(got, exact(tensors, MASKS[mask]), strict=True):
        assert x.isfinite().all() and (x.double() - want).norm() <= 0.05 * (want.norm() + 0.1 * want.numel() ** 0.5)
