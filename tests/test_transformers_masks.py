"""flashgqa.transformers: its masks are the tensors that transformers makes, key by key."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

import flashgqa.transformers as ft  # noqa: E402
from flashgqa import _transformers_masks as masks  # noqa: E402

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5

PATTERNS = {
    "causal": lambda: masking_utils.causal_mask_function,
    "window": lambda: masking_utils.sliding_window_causal_mask_function(3),
    "wide window": lambda: masking_utils.sliding_window_causal_mask_function(100),
    "chunk": lambda: masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "chunks of their own": lambda: masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "window and chunk": lambda: masking_utils.and_masks(
        masking_utils.sliding_window_overlay(3), PATTERNS["chunk"](), masking_utils.sliding_window_overlay(5)),
    "unknown": lambda: masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, i, j: (i + j) % 3 != 1),
    "union": lambda: masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, i, j: j == 4),
}  # fmt: skip
if VERSION_5:
    PATTERNS |= {
        "all": lambda: masking_utils.bidirectional_mask_function,
        "both sides": lambda: masking_utils.sliding_window_bidirectional_mask_function(2),
    }
# (rows, keys, row 0's position, key 0's position)
PLACES = {
    "square": (6, 6, 0, 0), "step": (1, 9, 8, 0), "more": (3, 9, 6, 0), "static": (4, 12, 0, 0), "static more": (3, 12, 5, 0),
    "rolled": (3, 7, 14, 10), "rolled chunk": (1, 4, 15, 12), "cross": (5, 9, 0, 0), "one of one": (1, 1, 0, 0),
}  # fmt: skip
PADDINGS = {"none": None, "ones": (0, 0), "left": (2, 0), "right": (0, 1), "both": (1, 1), "all of one": (30, 0)}


def visible(mask, q_length, kv_length):
    """bool [2, 1, sq, sk]: to which keys the attention function gives weight."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, q_length, 4), torch.randn(2, 1, kv_length, 4)
    weights = ft.attention_forward(torch.nn.Identity(), q, k, k, mask, output_attentions=True)[1]
    assert torch.equal(weights[:, :1] > 0, weights[:, 1:] > 0)
    return weights[:, :1] > 0


def mask_arguments(place, padding, **more):
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    tokens = None
    if PADDINGS[padding] is not None:
        left, right = PADDINGS[padding]
        tokens = torch.ones(2, q_offset + q_length if "cross" not in place else kv_length, dtype=torch.bool)
        tokens[1, :left] = False
        tokens[0, tokens.shape[1] - right :] = False
    where = dict(q_length=q_length, q_offset=q_offset)
    if not VERSION_5:
        where = dict(cache_position=torch.arange(q_length) + q_offset)
    return dict(batch_size=2, kv_length=kv_length, kv_offset=kv_offset, attention_mask=tokens, **where, **more)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_mask_is_the_tensor_that_transformers_makes(pattern, place):
    """Each pattern in each place, with each padding: the same keys are visible to our kernels as in the bool tensor."""
    bidirectional = pattern in ("all", "both sides")
    for padding in PADDINGS:
        arguments = mask_arguments(place, padding, mask_function=PATTERNS[pattern]())
        dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        allowed = pattern not in ("unknown", "union") and not bidirectional
        skips = [dict(allow_is_causal_skip=False)]
        if allowed:
            local = {"window": 3, "wide window": 100}.get(pattern, 4 if "chunk" in pattern else None)
            skips.append(dict(allow_is_causal_skip=True, local_size=local))
        if bidirectional:
            skips.append(dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=True,
                              local_size=2 if pattern == "both sides" else None))
        for skip in skips:
            mask = masks.create(**arguments, **skip)
            if isinstance(mask, masks.IntervalMask):
                assert torch.equal(mask.dense(), dense) and mask.shape == dense.shape
            if mask is None:
                assert True in skip.values() and dense.all()
            assert torch.equal(visible(mask, *PLACES[place][:2]), dense), (padding, skip)


@pytest.mark.parametrize("pattern", ["causal", "window", "chunk", "window and chunk", "both sides"])
@pytest.mark.parametrize("place", ["square", "more", "static", "static more"])
def test_no_mask_of_the_square(pattern, place):
    if pattern not in PATTERNS:
        pytest.skip("transformers 4 has no bidirectional windows")
    if pattern == "both sides" and place == "static more":
        return                      # where the sequence ends is said by nothing but the tensor
    for padding in ("none", "left", "right"):
        mask = masks.create(**mask_arguments(place, padding, mask_function=PATTERNS[pattern]()))
        held = [x for x in mask.options.values() if isinstance(x, torch.Tensor)]
        assert isinstance(mask, masks.IntervalMask)
        assert all(x.numel() <= 2 * PLACES[place][1] for x in held)


@pytest.mark.parametrize("pattern", ["causal", "unknown", *(["all"] if VERSION_5 else [])])
def test_a_bool_mask_is_not_used_on_scores(pattern):
    arguments = mask_arguments("square", "left", mask_function=PATTERNS[pattern]())
    mask, scores = masks.create(**arguments), torch.zeros(2, 3, 6, 6)
    dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    for add in (
        lambda: scores + mask, lambda: mask + scores, lambda: scores.clone().add_(mask), lambda: scores + mask[:, :, :, :6],
        lambda: torch.add(scores, mask), lambda: scores + mask[:, :, -6:].expand(2, 3, 6, 6),
        lambda: scores.clone().__iadd__(mask), lambda: scores.masked_fill(mask, -1.0),
        lambda: scores.masked_fill_(mask=mask[:, :, :6], value=-1.0),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match='AttentionInterface.*"eager"'):
            add()
    additive = (1.0 - mask.to(torch.float32)) * -1e9
    assert torch.equal(scores + additive, scores + (1.0 - dense.float()) * -1e9)
    assert torch.equal(scores.masked_fill(~mask[:], -1.0), scores.masked_fill(~dense, -1.0))
    assert torch.equal(scores.masked_fill(mask == 0, value=-1.0), scores.masked_fill(~dense, -1.0))
    assert torch.equal(torch.where(mask[:, :, -6:], scores, 1.0), torch.where(dense, scores, 1.0))
    assert torch.equal(copy.deepcopy(mask)[:], dense) and torch.equal(pickle.loads(pickle.dumps(mask[:])), dense)


def test_offset_on_the_device_is_not_read():
    """A static cache on a GPU has its length there: the diagonal comes from lengths made there, without waiting."""
    arguments = mask_arguments("static more", "left", mask_function=PATTERNS["window"]())
    dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q_offset = torch.tensor(5, device="meta")
    if VERSION_5:
        arguments |= dict(q_offset=q_offset, device="meta")
    else:
        arguments |= dict(cache_position=torch.arange(3, device="meta") + q_offset)
    arguments["attention_mask"] = None
    options = masks.create(**arguments).options
    assert options["kv_lens"].shape == (2,) and options["window"] == (2, 0) and options["causal"] and "align" not in options
    real = masks.IntervalMask(options | dict(kv_lens=torch.tensor([8, 8], dtype=torch.int32)), None, dense.shape, dense.device)
    arguments = mask_arguments("static more", "none", mask_function=PATTERNS["window"]())
    assert torch.equal(visible(real, 3, 12), masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_interval_mask_acts_as_its_tensor():
    arguments = mask_arguments("square", "left", mask_function=PATTERNS["window"]())
    mask, dense = masks.create(**arguments), masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert isinstance(mask, masks.IntervalMask) and not isinstance(mask, torch.Tensor)
    assert mask.ndim == mask.dim() == 4 and mask.shape == dense.shape and mask.dtype == torch.bool and mask.device == dense.device
    assert torch.equal(mask[:, :, :, :3], dense[:, :, :, :3])
    assert torch.equal(torch.cat([dense, mask], dim=-1), torch.cat([dense, dense], dim=-1))
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float()) and torch.equal(mask.float(), dense.float())
    assert torch.equal(mask & dense, dense) and torch.equal(dense & mask, dense) and torch.equal(~mask, ~dense)
    assert torch.equal((1.0 - mask.float()), 1.0 - dense.float()) and torch.equal(mask.to(torch.float64), dense.double())
    assert torch.equal(mask == dense, torch.ones_like(dense)) and mask.sum() == dense.sum()
    assert isinstance(mask.to("cpu"), masks.IntervalMask) and isinstance(mask.to(device="cpu"), masks.IntervalMask)
    assert torch.equal(copy.deepcopy(mask).dense(), dense)
    assert masks.create(**arguments | dict(attention_mask=mask)) is mask
    moved = mask.to("meta")
    assert moved.options["mask"].device.type == "meta" and moved.device.type == "meta"
    assert not hasattr(mask, "no_such_thing")
