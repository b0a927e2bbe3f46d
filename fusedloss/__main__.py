"""``python -m fusedloss info``"""

import argparse

from .backends import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedloss")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, what runs, and why the rest does not")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
