"""The package as others install it: away from the checkout, a wheel trains a shipped config."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
OVERRIDES = (
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.context=16",
    "--config.model.scan_unroll=1",
    "--config.data.tokenizer=bytes",
    "--config.train.steps=2",
    "--config.train.branch_step=1",
    "--config.train.validate_tokens=100",
)


def run(*command: object, folder: Path) -> str:
    """Returns what a command prints that must succeed and cannot see the checkout."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in paths if path and Path(path).resolve() != ROOT]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | variables,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(folder: Path) -> Path:
    """Installs a wheel of the checkout in an environment of its own; returns its `bin`.

    Other packages come from this environment, by a .pth file: those in it, which would add the
    checkout, are not read.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*build, "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    bin_, site = folder / "env" / "bin", sysconfig.get_path("purelib")
    run(
        *pip,
        "--python",
        bin_ / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        folder=folder,
    )
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    new_site = Path(run(bin_ / "python", "-c", program, folder=folder).strip())
    (new_site / "packages.pth").write_text(f"{site}\n")
    return bin_


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling builds the wheel"
)
def test_an_installed_wheel_trains_a_shipped_config_in_any_folder(tmp_path):
    (tmp_path / "wheel").mkdir()
    bin_ = install(tmp_path / "wheel")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    where = run(bin_ / "python", "-c", "import demix_jax; print(demix_jax.__file__)", folder=folder)
    assert where.startswith(str(tmp_path / "wheel"))
    page = (
        "from importlib import resources; print(resources.files('demix_jax.serving') / 'page.html')"
    )
    shown = Path(run(bin_ / "python", "-c", page, folder=folder).strip())
    assert shown.read_text().startswith("<!doctype html>")
    for path in ("quick", "configs/quick.py"):
        assert "model.scan_unroll" in run(bin_ / "demix", "config", "--config", path, folder=folder)

    tiny.write_prepared(folder / "data", ("law", "med"))
    train = [bin_ / "demix", "train", "--config", "quick", "--data_dir", "data", "--workdir", "run"]
    assert "step 2/2" in run(*train, *OVERRIDES, folder=folder)
    assert (folder / "run" / "run.json").exists()
