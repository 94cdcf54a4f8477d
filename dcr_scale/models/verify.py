"""``python -m dcr_scale.models.verify FOLDER``: is an exported checkpoint what its manifest says?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dcr_scale.command_line import exit_code
from dcr_scale.errors import UserError
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.disk import restore_replaced
from dcr_scale.models.manifest import MANIFEST_FILE, Manifest, hash_file


def damage(folder: Path) -> Iterator[str]:
    """A line for everything in ``folder`` that is not as its manifest says; every byte is read once.

    Raises UserError where there is no folder or no manifest.
    """
    restore_replaced(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: holds no {MANIFEST_FILE} of dcr-scale, so there is nothing to compare its bytes with; every "
            "export writes one"
        )
    for file, size in manifest.sizes.items():
        path = folder / file
        try:
            found = path.stat().st_size
            if found != size:
                yield f"{file}: {found} bytes, {size} were written"
            elif file not in manifest.headers:
                if hash_file(path) != manifest.others.get(file):
                    yield f"{file}: differs"
            else:
                yield from _damage_in_weights(Checkpoint.of_file(path), file, manifest)
        except FileNotFoundError:
            yield f"{file}: missing"
        except OSError as error:
            yield f"{file}: cannot be read ({error.strerror})"
        except UserError as error:
            yield str(error).removeprefix(f"{folder}/")


def _damage_in_weights(weights: Checkpoint, file: str, manifest: Manifest) -> Iterator[str]:
    path = weights.folder / file
    if hash_file(path, nbytes=weights.data_start(file)) != manifest.headers[file]:
        yield f"{file}: its header differs"
    hashes = {name: hash_file(path, info.start, info.nbytes) for name, info in weights.tensors.items()}
    for tensor in manifest.differing(hashes):
        yield f"{file}: tensor {tensor} differs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all is as written, 1 where something is damaged, 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m dcr_scale.models.verify", description=__doc__.split(": ")[1])
    parser.add_argument("folder", type=Path, help="a checkpoint that a run exported, such as runs/demo/refined")
    given = parser.parse_args(arguments)
    found: list[str] = []

    def show() -> None:
        for line in damage(given.folder):
            found.append(line)
            print(line, flush=True)
        if not found:
            print(f"{given.folder}: every file is as it was written")

    return exit_code(show) or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
