"""The README stays true: its commands run, in order, in one empty folder, and so does its Python."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.layout import BASIS, BATCHES, FITS, IMAGES, record_path, significant_path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.timeout(300)
def test_its_commands_and_its_python_run(tmp_path: Path) -> None:
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands[0] == "spectrograph demo"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    programs = (f"{sys.executable} -W error -c {shlex.quote(code)}" for code in blocks("python"))
    for command in [*commands, *programs]:
        found = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"


def test_the_targets_it_names_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines()}
    assert targets == {"demo", "test"}
    assert all(f"\n{target}: " in makefile for target in targets)


def test_the_layout_it_shows_is_the_layout(full_store: Path) -> None:
    shown = next(block for block in blocks("text") if "zarr.json" in block)
    for name in (BASIS, BATCHES, IMAGES, FITS, str(record_path("monday", 0)), str(significant_path("monday", 0))):
        assert name in shown
    assert sorted(entry.name for entry in (full_store / BATCHES / "default").iterdir() if entry.is_dir()) == sorted(
        ["heads", "mlps", "embedding", "representation", "constants", "tokens", "cls_to_cls"]
    )
