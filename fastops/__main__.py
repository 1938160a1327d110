"""The command line: `fastops info | doctor | demo | bench`, also `python -m fastops ...`."""

import argparse
import sys

import fastops


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    from fastops import demo
    from fastops.explain import add_arguments, run

    parser = argparse.ArgumentParser(
        prog="fastops", description="Ordinary PyTorch models, faster, without changing them."
    )
    parser.add_argument("--version", action="version", version=f"fastops {fastops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | doctor | demo | bench")
    info = commands.add_parser("info", help="what is running, and why")
    info.set_defaults(run=_info)
    looks = commands.add_parser("doctor", help="what fastops would gain for a model of yours, and by which call")
    looks.set_defaults(run=run)
    add_arguments(looks)
    trains = commands.add_parser("demo", help="train real models with PyTorch and with fastops, side by side")
    trains.set_defaults(run=demo.run)
    demo.add_arguments(trains)
    measures = commands.add_parser("bench", help="time fastops against PyTorch")
    try:
        from fastops.benchmarks import command
    except ModuleNotFoundError as error:
        # A checkout that was built and not installed, where `info` has to work all the same.
        if error.name != "fastops.benchmarks":
            raise
        measures.set_defaults(run=_not_installed)
    else:
        measures.set_defaults(run=command.run)
        command.add_arguments(measures)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = parser().parse_args(arguments)
    return options.run(options)


def _info(options: argparse.Namespace) -> int:
    print(fastops.info())
    return 0


def _not_installed(options: argparse.Namespace) -> int:
    print("fastops bench: fastops.benchmarks is not installed. Run: pip install --editable .", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
