"""``python -m flashgqa kv-size``: what the KV cache of a model takes, and would take with more or fewer KV heads."""

from typing import NamedTuple

import flashgqa


class Model(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    dim: int  # of a head


# From the models' published configurations.
MODELS = {
    "Llama 2 7B": Model(32, 32, 32, 128),
    "Llama 2 70B": Model(80, 64, 8, 128),
    "Llama 3 8B": Model(32, 32, 8, 128),
    "Llama 3 70B": Model(80, 64, 8, 128),
    "Llama 3.1 405B": Model(126, 128, 8, 128),
    "Mistral 7B": Model(32, 32, 8, 128),
    "Mixtral 8x7B": Model(32, 32, 8, 128),
    "Qwen2.5 7B": Model(28, 28, 4, 128),
    "Falcon 7B": Model(32, 71, 1, 64),
    "Gemma 2B": Model(18, 8, 1, 256),
}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _size(count):
    n = 0
    while count >= 1024 and n < len(UNITS) - 1:
        count, n = count / 1024, n + 1
    return f"{count:.0f} B" if n == 0 else f"{count:.2f} {UNITS[n]}"


def _kind(kv_heads, heads):
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"


def find(name):
    """The model whose name matches, whatever its case and blanks."""

    def plain(text):
        return "".join(c for c in text.lower() if c.isalnum() or c == ".")

    for known, model in MODELS.items():
        if plain(known) == plain(name):
            return model
    raise ValueError(f"--model {name}: known are {', '.join(MODELS)}; or give --layers, --heads, --kv-heads, --dim")


def _print(first_header, lines, context, batch):
    """Lines of (name, layers, heads, kv heads, dim, dtype), MHA of the same shape being 100 %."""
    width = max(len(first_header), *(len(line[0]) for line in lines))
    total = f"{context:,} tokens" + (f" x {batch}" if batch > 1 else "")
    print(
        f"{first_header:<{width}}  {'layers':>6}  {'heads':>5}  {'KV heads':>8}  {'dim':>3}  {'bytes a token':>13}  {total:>18}  "
        "of MHA"
    )
    for name, layers, heads, kv_heads, dim, dtype in lines:
        token = flashgqa.kv_cache_bytes(layers, kv_heads, dim, dtype)
        whole = flashgqa.kv_cache_bytes(layers, kv_heads, dim, dtype, context, batch)
        print(
            f"{name:<{width}}  {layers:>6}  {heads:>5}  {kv_heads:>8}  {dim:>3}  {token:>13,}  {_size(whole):>18}  "
            f"{100 * kv_heads / heads:5.1f} %"
        )


def kv_size(model, dtype, context, batch):
    layers, heads, kv_heads, dim = model
    if heads % kv_heads:
        raise ValueError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    print(f"KV cache in {dtype}: 2 * layers * KV heads * dim * bytes of an element, for each token\n")
    choices = sorted({heads, kv_heads, 1, *(n for n in (8, 4) if heads % n == 0 and n < heads)}, reverse=True)
    lines = [(f"{_kind(n, heads)}{' (this model)' if n == kv_heads else ''}", layers, heads, n, dim, dtype) for n in choices]
    _print("this shape", lines, context, batch)
    print()
    _print("known models", [(name, *shape, dtype) for name, shape in MODELS.items()], context, batch)
    return 0
