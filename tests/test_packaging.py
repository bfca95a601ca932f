"""A plain ``pip install .`` brings everything that the commands need."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_packages_the_toy_models_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "spectrograph.py"):
        shutil.copy(ROOT / name, source)
    for name in ("schemas", "workers", "services"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    expected |= {
        f"workers/toyworld/{kind}/{name}"
        for kind in ("vit", "resnet")
        for name in ("model.safetensors", "open_clip_config.json")
    }
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", *build, str(tmp_path), str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "spectrograph = services.cli:main" in wheel.read(points).decode()
    assert expected <= names
