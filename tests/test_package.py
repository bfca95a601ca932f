"""Promises of the package as a whole: light imports, one direction, a guarded public face."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spectrograph
from schemas import errors

ROOT = Path(__file__).parent.parent
ALLOWED = {"schemas": {"schemas"}, "workers": {"workers", "schemas"}, "services": {"services", "workers", "schemas"}}


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        tops = {name.split(".")[0] for name in imported(file)}
        assert tops & set(ALLOWED) <= ALLOWED[package], file
        if package == "schemas":
            assert not tops & {"torch", "open_clip", "ray"}, file


@pytest.mark.parametrize("statement", ["import spectrograph; dir(spectrograph)", "import services.cli"])
def test_importing_and_help_load_neither_torch_nor_ray(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'ray', 'open_clip', 'zarr'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_the_public_names_are_these() -> None:
    assert spectrograph.__all__ == ["SpectrographError", "Store", "component", "open"]
    assert all(getattr(spectrograph, name) is not None for name in spectrograph.__all__)
    with pytest.raises(AttributeError, match="it has SpectrographError"):
        _ = spectrograph.nothing


def test_every_error_is_in_the_one_tree() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(found, errors.SpectrographError) for found in classes)
    assert errors.__doc__ is not None
    assert all(found.__name__ in errors.__doc__ for found in classes)
