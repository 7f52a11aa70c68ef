"""Trains a small Llama with grouped heads on the source of Python's standard library, byte by byte, and lets it write on.

pip install transformers
python examples/train_tiny_llama.py [steps]

The first steps run with transformers' "eager" attention as well, from the same start: the losses are the same.
"""

import pathlib
import sys
import time

import torch
import transformers

import flashgqa.transformers

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
BATCH, LENGTH, COMPARED = 8, 128, min(10, STEPS)


def new_model(attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def corpus():
    sources = sorted(pathlib.Path(pathlib.__file__).parent.glob("*.py"))
    if not sources:     # pathlib is a package from Python 3.13 on
        sources = sorted(pathlib.Path(pathlib.__file__).parent.parent.glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in sources[:80])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model, text, steps, report=None):
    """The loss of each step, in nats a byte."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(text) - LENGTH, (BATCH,))
        ids = torch.stack([text[at : at + LENGTH] for at in starts])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if report and (step % 20 == 19 or step == steps - 1):
            report(step + 1, losses)
    return losses


def main():
    flashgqa.transformers.register()
    transformers.logging.set_verbosity_error()
    text = corpus()
    print(f"{len(text):,} bytes of source; {new_model('fgqa').num_parameters():,} parameters, 8 query heads on 2 KV heads")

    both = [train(new_model(name), text, COMPARED) for name in ("eager", "fgqa")]
    difference = max(abs(a - b) for a, b in zip(*both, strict=True))
    print(f"largest difference of the first {COMPARED} losses to eager's: {difference:.1e}")

    begin = time.perf_counter()

    def report(step, losses):
        recent = losses[-20:]
        rate = step * BATCH * LENGTH / (time.perf_counter() - begin)
        print(f"step {step:4d} of {STEPS}  loss {sum(recent) / len(recent):.3f}  {rate:8,.0f} bytes/s", flush=True)

    model = new_model("fgqa")
    losses = train(model, text, STEPS, report)
    prompt = torch.tensor([list(b"def __init__(self")])
    written = model.eval().generate(prompt, max_new_tokens=80, do_sample=False)[0]
    print(bytes(written.tolist()).decode("utf-8", "replace"))
    return difference < 1e-3 and losses[-1] < losses[0]


if __name__ == "__main__":
    sys.exit(0 if main() else "the loss is not eager's, or does not fall")
