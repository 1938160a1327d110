"""The command line: `fastops info | demo | bench`, also `python -m fastops ...`."""

import argparse
import sys

import fastops


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    from fastops import demo
    from fastops.benchmarks import command

    parser = argparse.ArgumentParser(
        prog="fastops", description="Ordinary PyTorch models, faster, without changing them."
    )
    parser.add_argument("--version", action="version", version=f"fastops {fastops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | bench")
    commands.add_parser("info", help="what is running, and why")
    demo.add_arguments(
        commands.add_parser("demo", help="train real models with PyTorch and with fastops, side by side")
    )
    command.add_arguments(commands.add_parser("bench", help="time fastops against PyTorch"))
    options = parser.parse_args(arguments)

    if options.command == "info":
        print(fastops.info())
        return 0
    return demo.run(options) if options.command == "demo" else command.run(options)


if __name__ == "__main__":
    sys.exit(main())
