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
"""


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


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


def main(argv=None):
    """Runs a command; its exit code: 0 done, 1 a check failed, 2 it could not run, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        if getattr(options, "threads", None):
            flashgqa.set_num_threads(options.threads)
        code = options.function(options)
        sys.stdout.flush()
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
