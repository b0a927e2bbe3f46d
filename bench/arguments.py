"""The options of the commands, with errors that name the wrong value."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import CASES, Case
from .measure import JOINING

PEERS = ("eager", "compile", *JOINING)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of rounds: at least 1")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not number >= 0:  # also false for nan
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds: at least 0")
    return number


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return names


def device(text: str) -> str:
    if text not in CASES:
        raise argparse.ArgumentTypeError(f"no cases for {text!r}; there are {', '.join(CASES)}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU here")
    return text


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, default="cpu", metavar="DEVICE", help="cpu (default) or cuda"
    )


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", type=regex, metavar="REGEX", help="cases whose 'table: name' matches (search)"
    )


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        type=peers,
        metavar="NAMES",
        help=f"of {','.join(PEERS)}, those to measure beside ours (default: all that are here)",
    )


def add_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=seconds, metavar="S", help="start no case later than this (default: all)"
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, metavar="DIR", help="default: build/bench/cpu, or the GPU's name"
    )
    where.add_argument(
        "--publish",
        action="store_true",
        help="write to bench/results, where README and docs have their figures from",
    )


def command(*words: str) -> str:
    """The command that repeats a run, without the options that say where it writes."""
    parser = argparse.ArgumentParser(add_help=False)
    add_out(parser)
    return shlex.join(["python", "-m", "bench", *parser.parse_known_args(words)[1]])


def matching(
    parser: argparse.ArgumentParser, only: re.Pattern[str] | None, cases: Sequence[Case]
) -> list[Case]:
    """The cases that match --only; if none does, an error lists them all."""
    found = [case for case in cases if only is None or only.search(case.id)]
    if not found and only is not None:
        names = "\n  ".join(case.id for case in cases)
        parser.error(f"--only {only.pattern!r} matches none of\n  {names}")
    return found
