"""attention_backward against the oracle under the error rule, and exactly where the right answer is exact."""

import numpy as np
import pytest
from cases import EDGES, SMOKE, SWEEP, built, gradients
from checking import assert_within, memory_bytes


def check_backward(case, backend):
    call, _ = built(case)
    answer = gradients(case)
    out, lse = backend.attention(*call.inputs, **call.options, return_lse=True)
    arrays = [call.dout, *call.inputs, call.dlse, out, lse, *(x for x in call.options.values() if isinstance(x, np.ndarray))]
    before = memory_bytes(*arrays)
    got = backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **call.options)
    assert memory_bytes(*arrays) == before, "an input was written"
    originals = {"dq": call.q, "dk": call.k, "dv": call.v, "dbias": call.options.get("bias"), "dsink": call.options.get("sink")}
    for name, original in originals.items():
        gradient = getattr(got, name)
        if original is None:
            assert gradient is None
            continue
        assert gradient.dtype == original.dtype, name
        naive = (getattr(result, name) for result in answer.naive)
        assert_within(name, gradient, getattr(answer.exact, name), naive, original.dtype, 3)


@pytest.mark.parametrize("case", SMOKE + EDGES, ids=str)
def test_backward_within_the_error_rule(case, backend):
    check_backward(case, backend)


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_backward_of_combined_options_within_the_error_rule(case, backend):
    check_backward(case, backend)
