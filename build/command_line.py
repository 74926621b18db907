"""The parser of all commands: a wrong option is an error like any other, one line and exit status 1.

Example: smc-run --tmperature 1 prints "smc-run: unrecognized arguments: --tmperature 1: did you mean --temperature? (--help
lists the options)".
"""

import argparse
import difflib
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """argparse, but a wrong option exits 1 like every other user error and names the closest one."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 1."""
        self.exit(1, f"{self.prog}: {message}{self._closest(message)} (--help lists the options)\n")

    def _closest(self, message: str) -> str:
        if not message.startswith("unrecognized arguments:"):
            return ""
        wrong = message.split(": ", 1)[1].split(maxsplit=1)[0]
        close = difflib.get_close_matches(wrong, list(self._option_string_actions), n=1)
        return f": did you mean {close[0]}?" if close else ""
