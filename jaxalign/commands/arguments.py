"""Flags of the small commands."""

import argparse


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser whose usage line reads `jaxalign COMMAND`."""
    return argparse.ArgumentParser(prog=f"jaxalign {command}", description=description)
