"""The run on a GPU that evidence.py asks for: tests, benchmarks, sanitizers, on one build.

    python benchmarks/whole_run.py FOLDER [--stages tests bench sanitizers]

Build with NVCC_APPEND_FLAGS=-lineinfo, so that sanitize.py can name functions. FOLDER gets a JUnit report and a log of each group
of tests, the sanitizers' logs, and the two JSON files, each as soon as it is there: a run that is cut off leaves what it has
done, and --stages goes on. Needs pytest-xdist and pytest-timeout.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, RESULTS = ROOT / "tests", ROOT / "benchmarks" / "results"
CHOSEN = "cuda or Cuda or hopper"
APART = "not 2_31 and not other_processes"      # what wants tens of gigabytes, or the device for itself: by hand

# (name, processes, patterns of files, -k); those of a tuple run side by side. A file is of the first group that names it. The
# first group has gigabytes of float64 a process.
GROUPS = (
    (("lengths", 10, ("test_hopper_lengths.py",), ""),
     ("jax", 3, ("test_jax_transforms.py",), ""),
     ("rows", 3, ("test_hopper_rows.py", "test_probes.py"), "")),
    (("frameworks", 6, ("test_torch*.py", "test_transformers*.py"), "cuda or Cuda"),
     ("caches", 9, ("test_decode*.py", "test_kvcache*.py", "test_guard*.py", "test_merged*.py"), f"({CHOSEN}) and {APART}")),
    (("backward", 15, ("test_hopper_backward*.py",), APART),),
    (("forward", 15, ("test_cuda*.py", "test_warmup*.py", "test_hopper*.py"), APART),),
    (("general", 15, ("test_*.py",), f"({CHOSEN}) and {APART} and not layering and not package"),),
)  # fmt: skip


def groups_with_files():
    """GROUPS, with a list of files for the patterns."""
    taken = set()
    for side_by_side in GROUPS:
        found = []
        for name, processes, patterns, chosen in side_by_side:
            files = sorted({path for pattern in patterns for path in TESTS.glob(pattern)} - taken)
            taken |= set(files)
            found.append((name, processes, files, chosen))
        yield found


def run_tests(folder):
    """True if none failed."""
    good = True
    for side_by_side in groups_with_files():
        began, started = time.monotonic(), []
        for name, processes, files, chosen in side_by_side:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(processes), "--durations", "8",
                       "--timeout", "90", "--timeout-method", "thread", f"--junitxml={folder / name}.xml", "-k", chosen, *files]
            log = (folder / name).with_suffix(".log")
            with log.open("w") as out:
                started.append((log, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)))
        for log, process in started:
            status = process.wait()
            print(f"{log.stem}: {log.read_text().strip().splitlines()[-1]}", flush=True)
            good &= status == 0
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    return good


def run_script(folder, name, *arguments):
    """A script beside this one, its output in FOLDER."""
    command, began = [sys.executable, ROOT / "benchmarks" / name, *arguments], time.monotonic()
    with (folder / f"{Path(name).stem}.log").open("a") as out:
        status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name} {' '.join(map(str, arguments[:1]))}: status {status}, {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=("tests", "bench", "sanitizers"), default=("tests", "bench", "sanitizers"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    good = True
    if "tests" in options.stages:
        good &= run_tests(folder)
    if "bench" in options.stages:
        good &= run_script(folder, "bench.py", "gpu", "--junit", *sorted(folder.glob("*.xml")))
        shutil.copy(RESULTS / "gpu.json", folder)
    if "sanitizers" in options.stages:
        good &= run_script(folder, "sanitize.py", "--logs", folder / "sanitizers", "--write")
        shutil.copy(RESULTS / "sanitizers.json", folder)
        good &= run_script(folder, "sanitize.py", "--kernels")
    sys.exit(not good)


if __name__ == "__main__":
    main()
