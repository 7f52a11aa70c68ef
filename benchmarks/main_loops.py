"""What ptxas made of the main loops of the kernels for Hopper: products, exponentials, accesses to spilled registers.

    python benchmarks/main_loops.py build/*/release/cuda_fwd_sm90_bf16_d128_dv128_tall.o ..     objects of a build, or its module

Needs cuobjdump and nvdisasm, of CUDA's toolkit or of pip (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). A line for each loop with
tensor-core products and exponentials, which is what all passes but the second of head dim 256 have. Exit status 1 if one of a
kernel without options touches local memory, or if there is none; those that merge parts in place are not asked, nor
decode_wide_kernel, which does where a warpgroup has 64 query rows.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+?)[\s;](.*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
PLAIN = re.compile(r"fgqa_fwd_sm90_\w+_((plain|tall|short|decode\w*)_kernel|tall_even)|.*(bwd|queries)_kernel.*score_kind0E.*")
LEAST_PRODUCTS, LEAST_EXPONENTIALS, LONGEST = 4, 8, 3000      # what jumps back further leads from tile to tile


def functions(cubin):
    """(name, instructions as (operation, operands), {label: index})."""
    text = subprocess.run(["nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        code, labels = [], {}
        for line in part.splitlines():
            if found := INSTRUCTION.match(line):
                code.append(found.groups())
            elif found := LABEL.match(line):
                labels[found.group(1)] = len(code)
        yield part.split(":")[0], code, labels


def count(code, *operations):
    return sum(name.startswith(operations) for name, _ in code)


def loops(code, labels):
    """Instructions of each innermost main loop."""
    found = []
    for end, (operation, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands) if operation == "BRA" else None
        begin = labels.get(target.group(), end + 1) if target else end + 1
        body = code[begin : end + 1] if end - begin < LONGEST else []
        if count(body, "HGMMA", "HMMA") >= LEAST_PRODUCTS and count(body, "MUFU.EX2") >= LEAST_EXPONENTIALS:
            found.append((begin, end))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [code[begin : end + 1] for begin, end in inner]


def main():
    bad, plain = False, 0
    for path in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["cuobjdump", "-xelf", "sm_90a", Path(path).resolve()], cwd=folder, capture_output=True, check=True)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                print(cubin.name.split(".")[0])
                for name, code, labels in functions(cubin):
                    for loop in loops(code, labels):
                        local = count(loop, "LDL", "STL")
                        asked = PLAIN.fullmatch(name) is not None
                        wrong = asked and local > 0
                        plain += asked
                        bad |= wrong
                        print(f"    {name:54s} {len(loop):5d} instructions, {count(loop, 'HGMMA', 'HMMA'):3d} products, "
                              f"{count(loop, 'MUFU.EX2'):3d} EX2, {local:3d} of local memory{'   WRONG' if wrong else ''}")
    sys.exit("no main loop of a kernel without options" if plain == 0 else bad)


if __name__ == "__main__":
    main()
