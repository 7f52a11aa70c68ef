"""How many float32 multiply-adds this machine does in registers alone: the ceiling of float32 rows of bench.py cpu."""
import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

CHAINS, ROUNDS = 12, 10_000_000     # as many sums at once hide the latency of two units
SOURCE = """
#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
#ifdef __x86_64__
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#else
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#endif
typedef float vector __attribute__((vector_size(BYTES)));
int lanes(void) { return BYTES / 4; }
float sums(long rounds)
{
    const vector m = (vector){} + 0.999f, c = (vector){} + 0.001f;
    vector BEGIN;
    for (long n = 0; n < rounds; n++) { STEP }
    return (SUM)[0];
}
"""


def library(folder):
    names = [f"x{n}" for n in range(CHAINS)]
    texts = {"BEGIN": ", ".join(f"{x} = (vector){{}} + {n}.5f" for n, x in enumerate(names)),
             "STEP": " ".join(f"{x} = {x} * m + c; KEEP({x});" for x in names), "SUM": " + ".join(names)}
    source = SOURCE
    for name, text in texts.items():
        source = source.replace(name, text)
    path = Path(folder) / "sums.c"
    path.write_text(source)
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", path.with_suffix(".so"), path], check=True)
    found = ctypes.CDLL(str(path.with_suffix(".so")))
    found.sums.argtypes = [ctypes.c_long]
    return found


def gflops(threads):
    """Of so many threads at once, the best of five; None without a C compiler."""
    if not shutil.which(os.environ.get("CC", "cc")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        found, best = library(folder), 0.0
        for _ in range(5):
            workers = [threading.Thread(target=found.sums, args=(ROUNDS,)) for _ in range(threads)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            best = max(best, 2 * threads * CHAINS * ROUNDS * found.lanes() / (time.perf_counter() - start) / 1e9)
    return best
