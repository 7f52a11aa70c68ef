"""Dependencies point one way: python -> xla -> cpu, cuda -> core. The core knows neither Python nor CUDA nor a backend.

And the order of csrc/cuda/kernels.def, as far as csrc/cuda/launch.c counts on it.
"""

import pathlib
import re

import pytest

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
# Folder of csrc -> folders whose headers it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "xla": {"core", "cpu", "cuda", "xla"},
    "python": {"core", "cpu", "cuda", "xla", "python"},
}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".cu", ".cuh", ".def"})
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_one_way(path):
    folder = path.relative_to(CSRC).parts[0]
    for quote, target in INCLUDE.findall(path.read_text(encoding="utf-8")):
        if quote == '"':
            found = next((at for at in (path.parent / target, CSRC / target) if at.exists()), None)
            assert found is not None, f"{target} is not a file of the project"
            reached = found.resolve().relative_to(CSRC).parts[0]
            assert reached in MAY_INCLUDE[folder], f"{folder}/ must not include {reached}/ ({target})"
        elif folder != "python":
            assert not re.match(r"(Python\.h|numpy/)", target), f"{folder}/ must not include {target}"
            if folder in ("core", "cpu"):
                assert not re.match(r"cuda", target), f"{folder}/ must not include {target}"
        if folder == "core":
            assert quote == '"' or re.match(r"(std\w+|string|math|float|limits|inttypes)\.h$", target), target


def test_rows_that_are_compared_stand_in_the_order_of_the_choice():
    """Of all that serve a call the first runs: a row that is preferred where others have emptier tiles stands before them."""
    lines = re.findall(r"^FGQA_KERNEL\((.*)\)", (CSRC / "cuda" / "kernels.def").read_text(), re.MULTILINE)
    rows, places = [tuple(cell.strip() for cell in line.split(",")) for line in lines], {}
    for place, (which, arch, dtype, d, dv, *_, variant) in enumerate(rows):
        places[which, arch, dtype, d, dv, variant] = place
    assert len(places) == len(rows) > 80
    wanted = {"short": ("short", "tall", "plain"), "tall": ("tall", "plain"), "dropout": ("dropout", "plain")}
    for *dims, variant in places:
        found = [places[(*dims, other)] for other in wanted.get(variant, ()) if dims[0] == "fwd" or other != "tall"]
        assert found == sorted(found), dims
    for which, arch, _, _, _, block_q, *_, variant in rows:          # FGQA_IS_SHORT()
        if (which, arch) == ("fwd", "90") and not variant.startswith("decode"):
            assert (variant == "short") == (int(block_q) < 128)
