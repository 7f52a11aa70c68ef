"""Bugs that users of other attention libraries met, and the tests that keep them out of this one.

Most are tests of something larger, elsewhere; those that had none are here.
"""

import pathlib
import re

import numpy as np
import pytest
from cases import EDGES, Case, build, built
from checking import place, same_bits
from test_backward import check_backward
from test_forward import FAR_STRIDES, check_forward, far_strides, sparse

import flashgqa

HERE = pathlib.Path(__file__).parent

# What went wrong, where it was reported, and the tests.
BUGS = {
    "rows that see nothing give NaN, one such row poisons all gradients (pytorch#103963, #41508, mlx#2608)": """
        test_masks.row_that_sees_nothing_is_zero_with_lse_of_the_sink test_masks.causal_rows_before_the_first_key_see_nothing
        test_torch_dropins.sdpa_rows_without_keys_are_zero test_torch_dropins.flash_attn_rows_without_keys_and_dropout""",
    "NaN in masked or padded keys, values or scratch memory leaks (pytorch#101967, fla#892)": """
        test_masks.poison_in_unseen_keys_changes_no_bit test_masks.nan_in_one_row_or_sequence_stays_there
        test_known_bugs.calls_before_change_no_bit test_weights.unseen_keys_weigh_exactly_nothing""",
    "dQ is NaN where a tail tile is scored 0 and all scores are very negative (pytorch#196678, cudnn-frontend#1072)": """
        test_known_bugs.very_negative_scores_before_every_tail
        test_properties.a_constant_added_to_all_scores_moves_the_lse_only""",
    "32-bit offsets overflow (flash-attention#2260, #1500, #2611, #767, #772)": """
        test_forward.elements_more_than_2_31_apart test_forward.mask_strides_beyond_2_31
        test_backward.elements_more_than_2_31_apart test_known_bugs.cache_slots_and_pages_more_than_2_31_elements_apart
        test_known_bugs.weights_of_elements_more_than_2_31_apart""",
    "tensors that are not contiguous are read as if they were (flash-attention#355, TransformerEngine#1195, pytorch#187506)": """
        test_arrays.memory_of_inputs_does_not_matter test_properties.random_calls_within_the_error_rule
        test_frameworks.torch_views_in_place test_known_bugs.gradients_of_outputs_in_any_memory""",
    "q and k in different layouts break the backward pass or the strides of traced results (flash-attention#818)": """
        test_known_bugs.each_tensor_in_memory_of_its_own test_torch_transforms.opcheck""",
    "windows off by one, differing between back ends (transformers#39408, #29623, vllm#3385)": """
        test_masks.seen_keys_are_those_of_the_definition test_properties.a_window_as_long_as_the_sequence_changes_no_bit
        test_transformers_masks.every_mask_is_the_tensor_that_transformers_makes""",
    "causal masks aligned to the wrong corner (pytorch#108108, #103082, onnx#8068, mlx#2835)": """
        test_masks.seen_keys_are_those_of_the_definition test_torch_dropins.sdpa_causal_bias test_reference.visible_by_hand""",
    "wrong GPU or stream (flash-attention#1782, #1793, #2356, flashinfer#452)": """
        test_cuda_streams.two_devices test_cuda_streams.the_current_stream_is_followed
        test_cuda_streams.a_given_stream_is_followed""",
    "sequences of length zero crash or hang (flash-attention#2562, #2470, #1537)": """
        test_masks.zero_length_sequences_change_no_bit_of_the_others test_masks.empty_tensors
        test_torch_dropins.flash_attn_varlen test_known_bugs.fewer_tokens_than_sequences""",
    "writes beyond a KV cache or through bad page numbers (flash-attention#2709, #638, vllm#47056)": """
        test_kvcache_errors.lengths_beyond_the_cache test_kvcache_errors.pages_that_do_not_exist
        test_kvcache.within_the_error_rule""",
    "dropout masks of forward and backward differ; random state in graphs (flash-attention#166, pytorch#99905, #197563)": """
        test_dropout.attention_drops_what_the_mask_says_and_scales_the_rest test_torch.gradcheck
        test_torch.checkpoint_drops_the_same_weights test_cuda.the_dropout_mask_is_that_of_the_cpu""",
    "races and deadlocks (flash-attention#2229, #2258, #2761)": """
        test_determinism.same_bits_from_run_to_run_and_for_any_number_of_threads test_threads.first_use_by_many_threads_at_once
        test_cuda.the_same_bits_every_time""",
    "gradients that differ from run to run (flash-attention#2158, #2510, #2549)": """
        test_determinism.same_bits_from_run_to_run_and_for_any_number_of_threads
        test_torch_training.deterministic_algorithms_and_the_same_bits""",
    "split keys combined wrongly where parts saw nothing (flash-attention 26d7d92f, 31920dda)": """
        test_properties.merge_of_empty_parts_and_of_a_part_that_holds_the_sink
        test_known_bugs.splits_of_the_keys_that_see_nothing""",
    "softcap not differentiated, or in the wrong order with bias (flash-attention#2466, #2544, TransformerEngine#3391)": """
        test_torch.gradcheck test_reference.softcap_alibi_sink_and_dropout_agree_with_torch_autograd
        test_backward.backward_within_the_error_rule""",
    "sinks dropped, of the wrong head, without gradient (modular#6591, flash-attention#1973, #2102)": """
        test_known_bugs.sinks_of_equal_scores_are_exact test_properties.a_sink_is_a_key_with_zero_value
        test_transformers.loss_and_gradients""",
    "few KV heads, odd ratios (pytorch#193893, flash-attention#2146)": """
        test_properties.grouped_heads_are_repeated_keys_and_values test_properties.permuted_batch_and_heads_permute_the_results
        test_forward.forward_within_the_error_rule""",
    "CUDA graph capture breaks (flash-attention#386, #2620, flashinfer#2432)": """
        test_cuda_streams.graph_capture_and_replay_with_other_inputs test_cuda_streams.the_call_does_not_wait""",
    "memory used after it was freed (flash-attention bc0e4ac0)": """
        test_arrays.result_outlives_everything_else test_known_bugs.inputs_may_go_right_after_the_call""",
    "float8 saturates, narrow sums lose digits (flash-attention#2717)": """
        test_kvcache.float8_rounds_to_nearest_and_saturates
        test_forward.equal_scores_average_a_power_of_two_of_integers_exactly""",
    "NaN when two streams or threads work at once (flashinfer 4c4013be)": """
        test_api.two_python_threads_at_once test_torch_transforms.threads_do_not_disturb_each_other
        test_torch_training.two_threads_train_two_models""",
    "DLPack capsules freed twice, crashes on unknown dtypes (pytorch#9260, cupy#8801)": """
        test_dlpack.capsule_is_consumed_and_deleted_once test_dlpack.hostile_tensor test_dlpack.capsule_consumed_twice
        test_dlpack.null_deleter_is_not_called""",
    "a cache of kernels or plans that forgets a parameter (flash-attention#2402, #2507)": """
        test_known_bugs.calls_before_change_no_bit test_torch_transforms.compile_packed_dropout_and_shapes_that_change""",
    "hangs after fork (OpenBLAS#240, LightGBM#4751, faiss#5206)": """
        test_api.fork_after_use test_threads.fork_while_another_thread_computes test_cuda.use_after_fork_is_an_error""",
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_has_tests(bug):
    for name in BUGS[bug].split():
        file, function = name.split(".")
        text = (HERE / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def test_{function}\(", text, re.M), f"{name} is gone"


# ---- state that outlives a call ----

VARIED = EDGES[::29]


def all_results(backend, call):
    out, lse = backend.attention(*call.inputs, **call.options, return_lse=True)
    return out, lse, *backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **call.options)


def test_calls_before_change_no_bit(rng, backend):
    """Calls of all kinds in any order, between others of nothing but NaN: threads keep scratch memory, plans may be kept."""
    calls = [build(case) for case in VARIED]
    first = [all_results(backend, call) for call in calls]
    for n in rng.permutation(len(calls)):
        poison = calls[(7 * n + 3) % len(calls)]
        q, k, v, dout = (np.full(x.shape, np.nan, x.dtype) for x in (*poison.inputs, poison.dout))
        all_results(backend, poison.__class__(q, k, v, dout, poison.dlse, poison.options))
        again = all_results(backend, calls[n])
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsink"), again, first[n], strict=True):
            assert same_bits(a, b), (name, VARIED[n])


def test_inputs_may_go_right_after_the_call(rng):
    """Results hold no view of the inputs, whose memory is overwritten here as soon as the call is back."""
    arrays = [rng.standard_normal((2, h, 40, 16)) for h in (4, 2, 2)]
    out, lse = flashgqa.attention(*arrays, causal=True, return_lse=True)
    gradients = flashgqa.attention_backward(out, *arrays, out, lse, causal=True)
    gone = [x.copy() for x in arrays]
    results = [*flashgqa.attention(*gone, causal=True, return_lse=True)]
    saved = [x.copy() for x in results]
    results += flashgqa.attention_backward(saved[0], *gone, *saved, causal=True)[:3]
    for x in (*gone, *saved):
        x[...] = np.nan
    assert all(same_bits(a, b) for a, b in zip(results, (out, lse, *gradients[:3]), strict=True))


# ---- tails ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sq", [1, 3])
def test_very_negative_scores_before_every_tail(sq, dtype, backend):
    """All scores near -120, or -600, whose exp is 0 in float32, for every number of keys past a multiple of any tile."""
    for sk in range(1, 130):
        scale = 5 * 8**-0.5 if sk % 3 == 0 else None
        case = Case(sq=sq, sk=sk, hq=2, hk=1, d=8, dtype=dtype, data="shift", causal=sk % 2 == 0, scale=scale)
        check_forward(case, backend)
        check_backward(case, backend)


# ---- memory ----


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_each_tensor_in_memory_of_its_own(dtype, rng, backend):
    """q, k, v, dout, out and their gradients each in another order of axes, with gaps, backwards: the bits of plain memory.
    With a bias of another 16-bit dtype beside a soft cap and dropout one kernel takes them all, wherever they lie."""
    call, _ = built(Case(b=2, hq=4, hk=2, sq=19, sk=40, d=24, dv=40, dtype=dtype, causal=True, bias="bhqk"))
    arrays = {name: np.ascontiguousarray(getattr(call, name)) for name in ("q", "k", "v", "dout")}
    bias = np.ascontiguousarray(call.options["bias"])
    bias = bias.astype(np.float16) if dtype == "bfloat16" else bias
    q, k, v, dout = arrays.values()
    options = {"causal": True, "softcap": 4.0, "dropout_p": 0.1, "seed": 5}
    out, lse = backend.attention(q, k, v, bias=bias, **options, return_lse=True)
    expected = backend.attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    for _ in range(24):
        placed = []
        for x in (q, k, v, dout, bias, out):
            order = (*rng.permutation(3).tolist(), 3)
            gaps = [int(n) for n in rng.integers(0, 3, 4)]
            flips = [bool(n) for n in rng.integers(0, 2, 3)] + [False]
            placed.append(place(x, (order, gaps, flips)))
        own_q, own_k, own_v, own_dout, own_bias, own_out = placed
        mine = backend.attention(own_q, own_k, own_v, bias=own_bias, **options, return_lse=True)
        assert same_bits(mine[0], out) and same_bits(mine[1], lse)
        got = backend.attention_backward(own_dout, own_q, own_k, own_v, own_out, lse, bias=own_bias, **options)
        assert all(same_bits(a, b) for a, b in zip(got[:4], expected[:4], strict=True))


def test_weights_of_elements_more_than_2_31_apart(rng):
    q, k = (rng.standard_normal((2, 3, 5, 24)).astype(np.float16) for _ in range(2))
    for strides in FAR_STRIDES.values():
        far = [sparse(x.shape, strides, np.float16) for x in (q, k)]
        far[0][...], far[1][...] = q, k
        for which in ({"rows": [0, 4]}, {"reduce": "keys"}):
            assert same_bits(flashgqa.attention_weights(*far, **which), flashgqa.attention_weights(q, k, **which))


@far_strides
def test_cache_slots_and_pages_more_than_2_31_elements_apart(strides, rng):
    pages, hk, size, d = 5, 2, 4, 16
    q, new = rng.standard_normal((2, 4, 1, d)).astype(np.float16), rng.standard_normal((2, hk, 1, d)).astype(np.float16)
    plain = [rng.standard_normal((pages, hk, size, d)).astype(np.float16) for _ in range(2)]
    far = [sparse(x.shape, strides, np.float16) for x in plain]
    far[0][...], far[1][...] = plain
    options = dict(cache_lens=np.int32([5, 7]), page_table=np.int32([[4, 0], [1, 3]]), causal=True)
    expected = flashgqa.attention_with_kvcache(q, *plain, new, new, **options)
    assert same_bits(flashgqa.attention_with_kvcache(q, *far, new, new, **options), expected)
    assert all(same_bits(a.copy(), b) for a, b in zip(far, plain, strict=True))


# ---- splits, empty sequences ----

HIDERS = {
    "mask": lambda sk, seen: {"mask": (np.arange(sk) == seen)[None]},
    "bias": lambda sk, seen: {"bias": np.where(np.arange(sk) == seen, 1, -np.inf).astype(np.float32)[None, None, None]},
    "window": lambda sk, seen: {"window": (sk - 1 - seen, None), "mask": (np.arange(sk) <= seen)[None]},
    "length": lambda sk, seen: {"kv_lens": np.int32([seen + 1]), "window": (0, 0)},
}


@pytest.mark.parametrize("how", HIDERS)
def test_splits_of_the_keys_that_see_nothing(how, rng, backend):
    """One query row over many keys is computed in parts; all but one of them see nothing, or all."""
    before, sk = flashgqa.get_num_threads(), 6000
    q, k, v = (rng.standard_normal((1, h, n, 16)).astype(np.float32) for h, n in ((8, 1), (2, sk), (2, sk)))
    try:
        for threads in (1, 4):
            flashgqa.set_num_threads(threads)
            for seen in (0, 1, 2999, 5998, 5999):
                options = HIDERS[how](sk, seen)
                out, lse = backend.attention(q, k, v, **options, return_lse=True)
                np.testing.assert_allclose(out, np.repeat(v[:, :, seen : seen + 1], 4, axis=1), rtol=3e-7)
                score = np.einsum("bhqd,bhkd->bhqk", q, np.repeat(k[:, :, seen : seen + 1], 4, axis=1))[..., 0] / 4
                np.testing.assert_allclose(lse, score + (how == "bias"), rtol=1e-4, atol=1e-4)
                got = backend.attention_backward(np.ones_like(out), q, k, v, out, lse, **options)
                assert (np.abs(got.dq).max() <= 1e-4) and (np.delete(got.dv, seen, axis=2) == 0).all()
                np.testing.assert_allclose(got.dv[:, :, seen], 4, rtol=1e-5)
            out, lse = backend.attention(q, k, v, mask=np.zeros((1, sk), bool), return_lse=True)
            assert (out == 0).all() and (lse == -np.inf).all()
    finally:
        flashgqa.set_num_threads(before)


def test_fewer_tokens_than_sequences(rng, backend):
    q, k, v = (rng.standard_normal((n, h, 8)).astype(np.float32) for n, h in ((2, 4), (1, 2), (1, 2)))
    cu_q, cu_kv = np.int32([0, 0, 1, 1, 1, 2, 2, 2]), np.int32([0, 0, 1, 1, 1, 1, 1, 1])
    out, lse = backend.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, return_lse=True)
    np.testing.assert_allclose(out[0], np.repeat(v[0], 2, axis=0), rtol=3e-7)
    assert (out[1] == 0).all() and (lse[:, 1] == -np.inf).all()
    got = backend.attention_backward(out, q, k, v, out, lse, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    assert all(np.isfinite(x).all() for x in got[:3]) and (got.dq[1] == 0).all()


# ---- sinks ----


@pytest.mark.parametrize("sq, sk", [(1, 7), (5, 7), (70, 130)])
def test_sinks_of_equal_scores_are_exact(sq, sk, rng, backend):
    """Values 1, scores 0: out = n / (n + exp(sink)) of n keys seen, by head; dsink = -sum over rows of dout * out * share."""
    q, k, v = np.zeros((1, 6, sq, 8), np.float32), np.zeros((1, 2, sk, 8), np.float32), np.ones((1, 2, sk, 8), np.float32)
    sink = np.linspace(-3, 3, 6).astype(np.float32)
    out, lse = backend.attention(q, k, v, causal=True, sink=sink, return_lse=True)
    n = np.arange(sk - sq + 1, sk + 1)[None, :]
    total = n + np.exp(sink.astype(np.float64))[:, None]
    np.testing.assert_allclose(out[0, :, :, 0], n / total, rtol=1e-6)
    np.testing.assert_allclose(lse[0], np.log(total), rtol=1e-6, atol=1e-6)
    dout = rng.standard_normal(out.shape).astype(np.float32)
    got = backend.attention_backward(dout, q, k, v, out, lse, causal=True, sink=sink)
    share = np.exp(sink.astype(np.float64))[:, None] / total
    expected = -(dout[0].astype(np.float64).sum(-1) * n / total * share).sum(axis=1)
    np.testing.assert_allclose(got.dsink, expected, rtol=1e-4, atol=1e-4)


# ---- torch ----


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced", "last axis strided"])
def test_gradients_of_outputs_in_any_memory(how):
    torch = pytest.importorskip("torch")
    fg = pytest.importorskip("flashgqa.torch")
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, 5, 8, requires_grad=True) for h in (4, 2, 2)]
    dout = torch.randn(2, 4, 5, 8)
    given = {
        "expanded": torch.randn(1, 1, 1, 1).expand(2, 4, 5, 8),
        "transposed": dout.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.randn(2, 4, 9, 11)[:, :, 2:7, 1:9],
        "last axis strided": torch.randn(2, 4, 5, 16)[..., ::2],
    }[how]
    wanted = torch.autograd.grad(fg.attention(*tensors, causal=True), tensors, given.contiguous())
    got = torch.autograd.grad(fg.attention(*tensors, causal=True), tensors, given)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
