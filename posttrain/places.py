"""Where conf/ and recipes/ are; light, for `posttrain --help` reads them too."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def package_folder(name: str) -> Path:
    """conf or recipes: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    found = next((f for f in (package / name, package.parent / name) if f.is_dir()), None)
    assert found is not None, f"the folder {name}/ is neither in {package} nor beside it"
    return found


def described(folder: Path) -> dict[str, str]:
    """Name → first comment line of each YAML file in a folder, Hydra's @package header apart."""
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
        found[file.stem] = comments[0] if comments else ""
    return found
