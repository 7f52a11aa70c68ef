"""Index arrays that say something wrong, on a GPU without check=True: no kernel touches memory outside of the tensors. Each
tensor has memory of its own between addresses that have none, and ends or begins there, so that any access beyond is a fault."""

import subprocess
import sys

import pytest

# A process of its own, whose CUDA context a fault ends.
MEMORY = """
import ctypes, itertools, sys
import torch
import flashgqa

cuda = ctypes.CDLL("libcuda.so.1")
torch.zeros(1, device="cuda")


class Location(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


class Properties(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("handles", ctypes.c_int), ("location", Location), ("security", ctypes.c_void_p),
                ("flags", ctypes.c_ubyte * 8)]


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


def asked(status):
    assert status == 0, status


class Bytes:
    def __init__(self, address, count):
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "|u1", "data": (address, False), "version": 3}


def mapped(count):
    "Address and size of as many bytes or more, between two stretches of addresses without memory."
    here, unit = Location(1, 0), ctypes.c_size_t()
    properties = Properties(1, 0, here)
    asked(cuda.cuMemGetAllocationGranularity(ctypes.byref(unit), ctypes.byref(properties), 0))
    size = -(-count // unit.value) * unit.value
    start, handle = ctypes.c_uint64(), ctypes.c_uint64()
    asked(cuda.cuMemAddressReserve(ctypes.byref(start), ctypes.c_size_t(size + 2 * unit.value), ctypes.c_size_t(0),
                                   ctypes.c_uint64(0), ctypes.c_uint64(0)))
    asked(cuda.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), ctypes.c_uint64(0)))
    address = start.value + unit.value
    asked(cuda.cuMemMap(ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.c_size_t(0), handle, ctypes.c_uint64(0)))
    asked(cuda.cuMemSetAccess(ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.byref(Access(here, 3)), ctypes.c_size_t(1)))
    return address, size


spaces = {}


def put(name, x, last):
    "x in memory of its own, at the end of it or at its begin."
    count = x.numel() * x.element_size()
    if spaces.get(name, (0, 0))[1] < count:
        spaces[name] = mapped(count)
    address, size = spaces[name]
    place = torch.as_tensor(Bytes(address + (size - count if last else 0), count), device="cuda")
    return place.view(x.dtype).view(x.shape).copy_(x)


def placed(last, **tensors):
    return {name: put(name, x, last) if torch.is_tensor(x) else x for name, x in tensors.items()}


def i32(x):
    return torch.tensor(x, dtype=torch.int32, device="cuda")
"""

CONTROL = MEMORY + """
address, size = mapped(100)
print(torch.as_tensor(Bytes(address, size + int(sys.argv[1])), device="cuda").int().sum().item())
"""

CACHES = MEMORY + """
B, HK, SIZE, COLUMNS, SLOTS, PAGES, ROWS = 3, 2, 16, 24, 384, 72, 5
WRONG = [
    {"cache_lens": (1, 10**6, 5)}, {"cache_lens": (-1, 10, -(2**31))}, {"cache_lens": (2**31 - 1, SLOTS - 1, SLOTS)},
    {"cache_lens": (SLOTS + 1, SLOTS + 2, 2**31 - 2)}, {"new_lens": (0, 10**6, 2**31 - 1)}, {"new_lens": (-5, 1, -(2**31))},
    {"left_pad": (10**6, -1, 2**31 - 1)}, {"left_pad": (-(2**31), SLOTS - 1, SLOTS)}, {"q_lens": (2**31 - 1, 10**6, -7)},
    {"page_table": (PAGES, -1, 2**31 - 1)}, {"page_table": (2**30, -(2**31), PAGES + 1)}, {"page_table": (2, 2, 2)},
    {"batch_index": (ROWS, -1, 2**31 - 1)}, {"batch_index": (2**30, -(2**31), 1)}, {"batch_index": (0, 4, 2**31 - 1)},
    {"cache_lens": (2**31 - 1, -(2**31), 10**6), "left_pad": (-1, 2**31 - 1, 5), "page_table": (2**30, -1, PAGES)},
]
dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[sys.argv[1]]
stored, g, sq, d = (torch.float8_e4m3fn if sys.argv[2] == "float8" else dtype), *map(int, sys.argv[3:6])
rows = set()
for last, appended, turned, wrong in itertools.product((True, False), (True, False), (True, False), WRONG):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, sq, d, device="cuda").to(dtype) for h in (g * HK, HK, HK))
    shape = (ROWS, HK, SLOTS, d) if "batch_index" in wrong else (PAGES, HK, SIZE, d)
    k_cache, v_cache = (torch.randn(shape, device="cuda").to(stored) for _ in range(2))
    given = {"cache_lens": i32((1, 300, 17)), "page_table": torch.arange(PAGES).int().cuda().view(B, COLUMNS)}
    for name, x in wrong.items():
        if name == "page_table":
            for n, page in enumerate(x):
                given[name][n, (0, 2, 1)[n]] = page
        elif name == "batch_index":
            given["page_table"] = None
            given[name] = i32(x)
        else:
            given[name] = i32(x)
    if "new_lens" in given and not appended:
        continue
    tensors = placed(last, q=q, k_cache=k_cache, v_cache=v_cache, k_new=k if appended else None, v_new=v if appended else None)
    options = placed(last, **given) | {"causal": True, "return_lse": True, "out": put("out", torch.zeros_like(q), last)}
    if turned:
        angles = torch.rand(2, SLOTS, d // 4, device="cuda")
        options["rotary"] = tuple(put(name, x, last) for name, x in zip(("cos", "sin"), angles, strict=True))
    rows.add(flashgqa.explain_with_kvcache(*tensors.values(), **{n: x for n, x in options.items() if n != "out"})["kernel"])
    flashgqa.attention_with_kvcache(*tensors.values(), **options)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        sys.exit(f"{wrong}, last {last}, appended {appended}, turned {turned}: {error}")
print(*sorted(rows))
"""

LENGTHS = MEMORY + """
WRONG = (2**31 - 1, -1, 10**6), (-(2**31), 10**6, 130), (300, 2**30, -5)
OFFSETS = (0, 10**6, 50, 300), (-7, 2**31 - 1, 300, 300), (-(2**31), 100, 400, 2**31 - 1), (5, 4, 3, 2)
dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[sys.argv[1]]
hq, hk, d = map(int, sys.argv[2:5])
for last, causal, which in itertools.product((True, False), (True, False), range(3 * len(WRONG) + len(OFFSETS))):
    torch.manual_seed(0)
    packed = which >= 3 * len(WRONG)
    shape = (lambda h: (300, h, d)) if packed else (lambda h: (3, h, 130, d))
    q, k, v = (torch.randn(shape(h), device="cuda").to(dtype) for h in (hq, hk, hk))
    if packed:
        x = i32(OFFSETS[which - 3 * len(WRONG)])
        given = {"cu_seqlens_q": x, "cu_seqlens_kv": x.clone()}
    else:
        names = (("q_lens",), ("kv_lens",), ("q_lens", "kv_lens"))[which % 3]
        given = {name: i32(WRONG[which // 3]) for name in names}
    tensors = placed(last, q=q, k=k, v=v)
    options = placed(last, **given) | {"causal": causal}
    out, lse = flashgqa.attention(*tensors.values(), **options, return_lse=True)
    out, lse, dout = put("out", out, last), put("lse", lse, last), put("dout", torch.randn_like(q), last)
    flashgqa.attention_backward(dout, *tensors.values(), out, lse, **options)
    flashgqa.attention_weights(*list(tensors.values())[:2], reduce="keys", **options)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        sys.exit(f"{given}, last {last}, causal {causal}: {error}")
"""


def run(program, *arguments):
    arguments = [str(x) for x in arguments]
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("beyond", [0, 1])
def test_an_access_beyond_is_a_fault(beyond):
    result = run(CONTROL, beyond)
    assert (result.returncode == 0) == (beyond == 0), result.stderr[-2000:]
    assert beyond == 0 or "illegal memory access" in result.stderr


@pytest.mark.parametrize(("dtype", "stored", "g", "sq", "d", "row"), [
    ("bfloat16", "", 4, 1, 128, "decode"), ("float16", "", 4, 2, 64, "decode"), ("bfloat16", "", 16, 1, 128, "decodewide"),
    ("bfloat16", "", 16, 4, 64, "decodewide"), ("bfloat16", "float8", 4, 1, 128, "decodef8"),
    ("float16", "float8", 16, 2, 128, "decodewidef8"), ("bfloat16", "", 4, 50, 128, "sm90"), ("bfloat16", "", 4, 50, 64, "sm90"),
    ("float16", "", 2, 40, 256, "sm90"), ("bfloat16", "", 2, 40, 96, "sm90"), ("bfloat16", "float8", 2, 40, 128, "sm90"),
    ("float32", "", 4, 1, 64, "cache"), ("float32", "float8", 4, 3, 128, "cache"), ("bfloat16", "", 1, 1, 200, "cache"),
])  # fmt: skip
def test_caches(dtype, stored, g, sq, d, row):
    result = run(CACHES, dtype, stored, g, sq, d)
    assert result.returncode == 0, result.stderr[-2000:]
    assert row in result.stdout


@pytest.mark.parametrize(("hq", "hk", "d"), [(4, 2, 128), (8, 1, 64), (2, 2, 256), (2, 1, 72)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lengths_and_offsets(dtype, hq, hk, d):
    result = run(LENGTHS, dtype, hq, hk, d)
    assert result.returncode == 0, result.stderr[-2000:]
