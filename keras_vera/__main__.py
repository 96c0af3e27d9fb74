"""`python -m keras_vera COMMAND` works on adapter files.

Exit codes: 0, it is done (`diff`: there is no difference); 1, `diff` found
differences; 2, something is wrong with an argument or a file, and nothing was
written.
"""

import argparse
import json
import sys

from keras_vera import _commands

_EPILOG = (
    "Exit codes: 0, done (diff: no difference); 1, diff found differences; "
    "2, something is wrong with an argument or a file; nothing was written."
)
_FILE = "a *.vera.safetensors file, or hf://user/repo for one on the Hub"


def main(arguments=None):
    args = _parser().parse_args(arguments)
    try:
        found, lines, code = args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines))
    if code:
        sys.exit(code)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m keras_vera", epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, run, text):
        command = commands.add_parser(
            name, help=text, description=text.capitalize(), epilog=_EPILOG
        )
        command.add_argument(
            "--json", action="store_true", help="print JSON, for programs"
        )
        command.set_defaults(run=run, prog=command.prog)
        return command

    command = add(
        "inspect",
        _commands.inspect,
        "say what an adapter file is, from its header",
    )
    command.add_argument("file", help=_FILE)
    command.add_argument(
        "--verify",
        action="store_true",
        help="read the numbers as well, and check the checksum",
    )

    command = add(
        "diff",
        _commands.diff,
        "say in which settings and layers two adapter files differ, with the "
        "cosines of their vectors",
    )
    command.add_argument("a", help=_FILE)
    command.add_argument("b", help="another one")

    command = add(
        "convert", _commands.convert, "write an adapter file in another form"
    )
    command.add_argument("file", help=_FILE)
    command.add_argument(
        "to",
        choices=["float32", "float16", "bfloat16", "peft", "lora"],
        help="a *.vera.safetensors file of that dtype, or a folder for PEFT "
        "with VeRA or LoRA",
    )
    command.add_argument("output", help="the file or folder to write")
    command.add_argument(
        "--preset",
        help="for peft and lora: the base model, a KerasHub preset",
    )
    command.add_argument(
        "--task",
        help="for peft and lora: the class of keras_hub.models that the "
        "adapter was saved from, such as CausalLM or TextClassifier "
        "(default: Backbone)",
    )
    command.add_argument(
        "--num-classes", type=int, help="for a classifier: its classes"
    )
    command.add_argument(
        "--rank",
        type=int,
        help="for lora: the best approximation of this rank (default: exact)",
    )
    return parser


if __name__ == "__main__":
    main()
