"""What the pins need of Python is what the package asks for: an older one must fail at once, not inside pip."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.specifiers import SpecifierSet
from toy import REPOSITORY


def test_every_pinned_package_runs_on_the_oldest_python_asked_for() -> None:
    (oldest,) = re.findall(r'python_requires=">=([\d.]+)"', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    pins = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    needs = {name: metadata.metadata(name).get("Requires-Python") for name in pins if _installed(name)}
    assert {"torch", "numpy", "transformers"} <= needs.keys()
    assert not {name: need for name, need in needs.items() if need and f"{oldest}.9" not in SpecifierSet(need)}


def _installed(name: str) -> bool:
    """Extras of trackers and the like have pins too."""
    try:
        metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return False
    return True
