"""Whether the GPU evidence on record belongs to the kernels in this tree.

    python benchmarks/evidence.py            prints match or mismatch, exit status 0 or 1

CI has no GPU. A run on one (whole_run.py) writes results/gpu.json, tests included, with a hash of every source file the kernels
are made of; this script compares that hash with the tree's. Comments and blank space do not count, so that a better sentence
does not make measurements stale. The same of results/sanitizers.json (sanitize.py).
"""
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
SANITIZERS = RESULT.with_name("sanitizers.json")
SOURCES = ("csrc/cuda", "csrc/core")
OWN_PLACE = ("options", "short")        # sections of gpu.json that can be measured apart from the rest and say where they were
SUFFIXES = {".c", ".h", ".cu", ".cuh", ".def"}

# A string or character literal, or a comment: literals are matched so that "//" inside them is not taken for a comment.
TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def stripped(text):
    """C source without comments, blank lines and trailing blanks."""
    text = TOKEN.sub(lambda m: m.group() if m.group()[0] in "\"'" else " ", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def tree_hash(root=ROOT):
    """sha256 over the names and stripped contents of the kernel sources, in sorted order."""
    digest = hashlib.sha256()
    files = sorted(p for folder in SOURCES for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(stripped(path.read_text()).encode() + b"\0")
    return digest.hexdigest()


def sanitizers(now):
    """What compute-sanitizer had to say, and of which kernels. 0 or 1."""
    if not SANITIZERS.exists():
        print("no run of the sanitizers on record")
        return 1
    record = json.loads(SANITIZERS.read_text())
    rows, then = record["rows"], record["sources_sha256"]
    clean = sum(row["clean"] for row in rows)
    print(f"sanitizers on {record['device']}, {record['toolkit']}: {clean} of {len(rows)} runs of a tool over a row are clean, "
          f"{sum(row['suppressed'] for row in rows)} reports are explained in sanitizer_reports.py")
    print(f"{'matches' if now == then else 'DOES NOT MATCH'} the tree ({now[:16]} here, {then[:16]} there)")
    return int(now != then or clean < len(rows))


def sections(record, now):
    """What of gpu.json did not run, or is of other kernels. 0 or 1."""
    bad, parts = 0, {"decode": {"rows": record["decode"], "sources_sha256": now}}
    for name, part in (parts | {name: record.get(name) for name in OWN_PLACE}).items():
        failed = [row["error"] for row in part["rows"] if "error" in row] if part else []
        if failed:
            print(f"{len(failed)} rows of {name} did not run, the first for: {failed[0]}")
        if not part or part["sources_sha256"] != now:
            print(f"{name}: {'DOES NOT MATCH the tree' if part else 'not in this record'}")
        bad |= bool(failed) or not part or part["sources_sha256"] != now
    return int(bad)


def main():
    if not RESULT.exists():
        print(f"no GPU evidence: {RESULT.relative_to(ROOT)} does not exist")
        return 1
    record = json.loads(RESULT.read_text())
    now, then = tree_hash(), record["sources_sha256"]
    tests = record["tests"]
    print(f"device {record['device']}, {record['toolkit']}; tests: {tests['passed']} passed, {tests['failed']} failed, "
          f"{tests['skipped']} skipped; {len(record['rows'])} benchmark rows")
    print(f"{'matches' if now == then else 'DOES NOT MATCH'} the tree ({now[:16]} here, {then[:16]} there)")
    return int(sections(record, now) | sanitizers(now) or now != then or tests["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
