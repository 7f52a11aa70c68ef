"""The command line, ``python -m flashgqa``: a parser, and one function for each subcommand."""

import argparse
import json
import os
import sys

import flashgqa

EXAMPLES = """\
examples:
  python -m flashgqa demo                  attention over 8,192 bytes of real text, forward and backward, timed and checked
  python -m flashgqa info                  this build, this machine, its kernels
  python -m flashgqa verify                every kernel and dtype against the float64 equations
  python -m flashgqa bench --plot a.png    against NumPy and PyTorch on this machine
  python -m flashgqa kv-size --context 32768 --model "Llama 3 8B"
"""
DTYPES = ("float64", "float32", "float16", "bfloat16")


def _number(kind, text, what):
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not {what} above 0")
    return value


def _positive(text):
    return _number(int, text, "a whole number")


def _seconds(text):
    return _number(float, text, "a time")


def _heads(text):
    """(hq, hk) of "32/8"."""
    hq, _, hk = text.partition("/")
    hq, hk = _positive(hq), _positive(hk or hq)
    if hq % hk:
        raise argparse.ArgumentTypeError(f"{text}: query heads must be a multiple of KV heads")
    return hq, hk


def _picture(text):
    """A file that can be written once all is measured."""
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text}: it must end in .png, .svg or .pdf")
    if not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {os.path.dirname(text)}")
    return text


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m flashgqa",
        description="Exact attention, forward and backward, for MHA, MQA and GQA.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flashgqa {flashgqa.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def command(name, function, help, epilog):
        sub = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(function=function)
        return sub

    sub = command(
        "demo",
        _demo,
        "attention over real text: timed, and checked on sampled rows",
        "examples:\n"
        "  python -m flashgqa demo\n"
        "  python -m flashgqa demo --tokens 32768 --text book.txt\n\n"
        "Exit code 1 if a sampled row is wrong.",
    )
    sub.add_argument("--tokens", type=_positive, default=8192, help="bytes of text, each one a token (default 8192)")
    sub.add_argument("--text", metavar="FILE", help="any file; default: the standard library's source")
    sub.add_argument("--threads", type=_positive, help="default: all cores that this process may use")

    sub = command(
        "info",
        _info,
        "this build, this machine, its kernels",
        "examples:\n  python -m flashgqa info\n  python -m flashgqa info --json",
    )
    sub.add_argument("--json", action="store_true", help="the same as JSON, for programs and bug reports")

    sub = command(
        "verify",
        _verify,
        "every kernel and dtype against the float64 equations, on this machine",
        "examples:\n"
        "  python -m flashgqa verify\n"
        "  python -m flashgqa verify --dtype float32 --kernel fwd_avx2 bwd_avx2\n\n"
        "Exit code 1 if anything is wrong, 2 if it could not run.",
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help=f"of {', '.join(DTYPES)}; default: all")
    sub.add_argument("--kernel", nargs="+", metavar="NAME", help="as info lists them; default: all that run here")
    sub.add_argument("--threads", type=_positive, help="default: all cores that this process may use")

    sub = command(
        "bench",
        _bench,
        "a small table of times: ours in turn with NumPy and, if installed, PyTorch",
        "examples:\n"
        "  python -m flashgqa bench\n"
        "  python -m flashgqa bench --tokens 256 512 --heads 16/16 --dim 64 --plot bench.png",
    )
    sub.add_argument(
        "--tokens", type=_positive, nargs="*", default=[512, 1024], help="of causal self-attention (default 512 1024)"
    )
    sub.add_argument("--cache", type=_positive, nargs="*", default=[8192], help="cached keys of one query's step (default 8192)")
    sub.add_argument("--heads", type=_heads, default=(32, 8), metavar="HQ/HK", help="query heads / KV heads (default 32/8)")
    sub.add_argument("--dim", type=_positive, default=128, help="head dim (default 128)")
    sub.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default float32")
    sub.add_argument("--seconds", type=_seconds, default=1.0, help="a row (default 1)")
    sub.add_argument("--plot", type=_picture, metavar="FILE", help="bar chart as png, svg or pdf; needs matplotlib")
    sub.add_argument("--threads", type=_positive, help="default: all cores that this process may use")

    sub = command(
        "kv-size",
        _kv_size,
        "bytes of the KV cache with MHA, GQA and MQA",
        "examples:\n"
        "  python -m flashgqa kv-size\n"
        '  python -m flashgqa kv-size --model "Llama 3 8B" --context 131072 --batch 8\n'
        "  python -m flashgqa kv-size --layers 24 --heads 16 --kv-heads 4 --dim 64 --dtype bfloat16",
    )
    sub.add_argument(
        "--model", default="Llama 2 7B", help="a known one; the following options change its shape (default Llama 2 7B)"
    )
    sub.add_argument("--layers", type=_positive)
    sub.add_argument("--heads", type=_positive, help="query heads")
    sub.add_argument("--kv-heads", type=_positive)
    sub.add_argument("--dim", type=_positive, help="head dim")
    sub.add_argument(
        "--dtype", default="float16", choices=("float32", "float16", "bfloat16", "float8_e4m3"), help="default float16"
    )
    sub.add_argument("--context", type=_positive, default=4096, help="tokens (default 4096)")
    sub.add_argument("--batch", type=_positive, default=1, help="sequences (default 1)")
    return parser


def _demo(options):
    from ._cli_demo import demo

    return demo(options.tokens, options.text)


def _info(options):
    config, kernels = flashgqa.show_config(), flashgqa.kernels()
    if options.json:
        print(json.dumps({"config": config, "kernels": kernels}, indent=2))
        return 0
    print(config)
    names = max(len(kernel["name"]) for kernel in kernels)
    passes = max(len(kernel["pass"]) for kernel in kernels)
    print("\nkernels, fastest first")
    for kernel in kernels:
        state = "available" if kernel["available"] else kernel["reason"]
        print(f"  {kernel['name']:<{names}}  {kernel['pass']:<{passes}}  {kernel['device']:<4}  {state}")
    return 0


def _verify(options):
    from ._cli_verify import verify

    return verify(options.device, options.dtype, options.kernel)


def _bench(options):
    from ._cli_bench import bench

    return bench(options.tokens, options.heads, options.dim, options.cache, options.dtype, options.seconds, options.plot)


def _kv_size(options):
    from ._cli_kv_size import find, kv_size

    model = find(options.model)
    given = {"layers": options.layers, "heads": options.heads, "kv_heads": options.kv_heads, "dim": options.dim}
    model = model._replace(**{name: value for name, value in given.items() if value is not None})
    return kv_size(model, options.dtype, options.context, options.batch)


def main(argv=None):
    """Runs a command; its exit code: 0 done, 1 a check failed, 2 it could not run, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        if getattr(options, "threads", None):
            flashgqa.set_num_threads(options.threads)
        code = options.function(options)
        print(end="", flush=True)  # there may be no sys.stdout
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2
