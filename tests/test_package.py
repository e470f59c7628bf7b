"""What an installed package has."""

import configparser
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["medforget_dataset", "harness_tasks", "unlearn"])
def test_every_file_that_is_not_code_is_installed(package):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in config["options.package_data"][package].split(",")]
    folder = ROOT / package
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files
    for file in files:
        name = file.relative_to(folder)
        assert any(len(Path(p).parts) == len(name.parts) and name.match(p) for p in patterns), name
