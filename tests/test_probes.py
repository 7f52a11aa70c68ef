"""What the kernels for Hopper are built of, each by itself (tests/cuda/probes.cu): tensor maps, where a copy leaves each element
in shared memory, descriptors of such tiles by rows and by columns, accumulators as the operand of the next product. Against
float64, in integers, of which all sums are exact."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(NVCC is None or not HOPPER, reason="needs nvcc and a GPU of compute capability 9.0")
# Head dim of q and k, keys of a tile, head dim of v: every width of a product that a row of kernels.def has, and the 32 keys of
# the shortest sequences (FGQA_WHOLE_KEYS).
TILES = [(64, 32, 64), (64, 64, 64), (64, 128, 64), (64, 192, 64), (64, 256, 64), (96, 96, 96), (128, 64, 128), (128, 128, 128),
         (192, 112, 192), (256, 64, 256), (256, 80, 256)]  # fmt: skip
B, HQ, HK, SQ, SK = 3, 8, 2, 150, 300
# Heads that share a tile, the first of them, the first row of q, the first key; some begin before a tensor or end behind it.
PLACES = {"inside": (1, 3, 11, 8), "end": (1, 5, SQ - 30, SK - 17), "begin": (1, 2, -10, -24), "heads": (4, 4, 40, 5),
          "all heads": (8, 0, SQ - 3, -1)}  # fmt: skip


@pytest.fixture(scope="module", params=DTYPES)
def library(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("probes") / f"probes_{request.param}.so"
    sources = ROOT / "tests/cuda/probes.cu", ROOT / "csrc/cuda/tensor_map.c", ROOT / "csrc/core/tensor.c"
    flags = ["-std=c++17", "-O3", "-diag-suppress=177", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run([NVCC, *flags, f"-DFGQA_DTYPE={request.param}", "-o", path, *sources], check=True)
    return DTYPES[request.param], ctypes.CDLL(str(path)).fgqa_probe


def rows_of(x, head, begin, count):
    """Rows of a head of the last sequence, those that do not exist as zeros."""
    rows = torch.arange(begin, begin + count, device="cuda")
    there = (rows >= 0) & (rows < x.shape[2]) & (head < x.shape[1])
    return x[-1, min(head, x.shape[1] - 1), rows.clamp(0, x.shape[2] - 1)] * there[:, None]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("d, n, dv", TILES)
def test_products_of_tiles(library, d, n, dv, place):
    dtype, probe = library
    heads, head, row, key = PLACES[place]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (B, HQ, SQ, d), (B, HK, SK, d), (B, HK, SK, dv)
    q, k, v = (torch.randint(-3, 4, shape, device="cuda", generator=generator).to(dtype) for shape in shapes)
    chunks = -(-d // 64)
    tile = torch.empty(chunks, 64, 8, 8, dtype=dtype, device="cuda")
    sizes = {"scores": (64, n), "out": (64, dv), "columns": (64, 64), "rows": (64, 64)}
    got = {name: torch.full(size, torch.nan, device="cuda") for name, size in sizes.items()}
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, tile, *got.values())]
    numbers = (B, HQ, HK, SQ, SK, d, n, dv, int(dtype == torch.bfloat16), heads, head, row, key)
    torch.cuda.synchronize()
    assert probe(*pointers[:3], *numbers, *pointers[3:]) == 0

    # row r of a tile that heads share: head r % heads of query row r / heads
    rows = torch.stack([rows_of(q, head + i, row, 64 // heads) for i in range(heads)], 1).flatten(0, 1)
    keys, values = (rows_of(x, head // (HQ // HK), key, n) for x in (k, v))
    padded = torch.nn.functional.pad(rows, (0, 64 * chunks - d)).view(64, chunks, 8, 8).transpose(0, 1)
    pieces = torch.arange(8, device="cuda") ^ (torch.arange(64, device="cuda") % 8)[:, None]
    assert torch.equal(tile, padded.gather(2, pieces[None, :, :, None].expand(chunks, 64, 8, 8)))
    scores = rows.double() @ keys.double().T
    first, second = rows[:, :64].double(), keys[:64, :64].double()
    out = scores.to(dtype).double() @ values.double()
    expected = {"scores": scores, "out": out}
    if n >= 64:                                            # as many as tiles of the backward pass have
        expected |= {"columns": first.T @ second, "rows": first @ second.T}
    for name, x in expected.items():
        assert torch.equal(got[name].double(), x), name
