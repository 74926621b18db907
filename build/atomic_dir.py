"""A folder that appears whole or not at all.

It is assembled in `.<output name>.building-<host>-<pid>` beside the output and renamed at the end. A killed build
leaves at most that hidden folder, which the next build of the same output removes. Example: engines/a-tp1 is
assembled by process 41 on host h in engines/.a-tp1.building-h-41.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smc_build.engine_dir import is_engine_dir
from smc_plugin.errors import ConfigError

_REPLACED = "-replaced"


def check_output(output: Path, force: bool) -> None:
    """Refuse a path whose content a build must not replace.

    Args:
        output: free, an empty folder, or (with force) an engine directory.
        force: whether an engine directory may be replaced.
    Raises:
        ConfigError: something else is there.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink():
        if not any(output.iterdir()):
            return
        if is_engine_dir(output):
            if force:
                return
            raise ConfigError(
                f"{output} already holds an engine directory, expected none: replace it with --force, or choose "
                "another --output"
            )
    raise ConfigError(f"{output} exists and is not an engine directory, expected a free path: choose another --output")


@contextmanager
def assembled(output: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block succeeds and vanishes when it fails.

    Raises:
        ConfigError: `output` has come to hold something that must not be replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f"{_leftover_prefix(output)}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        check_output(output, force)
        if is_engine_dir(output):
            _replace(output, folder)
        else:
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leftover_prefix(output: Path) -> str:
    return f".{output.name}.building-{platform.node()}-"


def _replace(output: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + _REPLACED)
    output.rename(replaced)
    try:
        folder.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced)


def remove_leftovers(output: Path) -> None:
    """Remove what killed builds of this output left; folders of builds that still run stay.

    A build that was killed between the two renames of --force has moved the old engine away: it goes back to its place.
    """
    prefix = _leftover_prefix(output)
    for folder in output.parent.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).removesuffix(_REPLACED)
        if not pid.isdecimal() or _is_other_running(int(pid)):
            continue
        if folder.name.endswith(_REPLACED) and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_other_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
