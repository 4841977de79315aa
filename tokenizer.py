"""
Text to token ids and back: byte-level BPE, trained here.

    python tokenizer.py train corpus.txt --vocab_size=4096 --out=tokenizer.json
    python tokenizer.py show "def hello(name):" --tokenizer=tokenizer.json
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from pathlib import Path

# -----------------------------------------------------------------------------
# What every command shares: options, errors in one line, files never half written.


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option ends in one line that names the nearest right one, with exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1].replace("-", "_"),
                                             [o.replace("-", "_") for o in self._option_string_actions], 1)
            message = f"unknown option {unknown[1]}"
            message += f", did you mean {near[0].replace('__', '--', 1)}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run_command(main):
    """Call main(): a user's mistake (ValueError, OSError) ends in one line and exit code 1, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows "?" for it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{name}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that appears at `path` complete or not at all: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
