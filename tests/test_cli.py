"""One pulse test per command through its real entry point, and bad input: one line, exit 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import tiny
def get_config():
    return tiny.config(pathlib.Path({data!r}), steps=4, branch_step=2)
"""
BLOCKED = ("tensorflow", "seqio", "tensorflow_datasets")


def demix(*arguments: object, blocked: bool = False) -> subprocess.CompletedProcess:
    """Runs `demix`; with `blocked`, in a process where TensorFlow and SeqIO cannot be imported."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED) if blocked else ""
    program = f"import sys\n{block}from demix_jax.cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=300,
        check=False,
    )


def failure(*arguments: object) -> str:
    """The error of a command that must fail with exit status 2 and no traceback."""
    done = demix(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("demix ")]
    return line


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Four domains as JSON lines, one of them to be called novel."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("law", "med", "code", "chat"):
        rows = [json.dumps({"text": text}) for text in tiny.sentences(name, 300)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    path = folder / "tiny_config.py"
    path.write_text(CONFIG.format(tests=str(ROOT / "tests"), data=str(folder / "data")))
    return path


@pytest.mark.slow
def test_prepare_train_and_evaluate(texts, config, tmp_path):
    flags = ["--config", config, f"--config.data.sources={texts}"]
    flags += ["--config.data.novel_domains=chat"]
    prepared = demix("prepare", *flags, blocked=True)  # JSON lines need no TensorFlow
    assert prepared.returncode == 0, prepared.stderr
    assert "chat             novel         300" in prepared.stdout

    again = demix("prepare", *flags, blocked=True)  # nothing to do
    assert again.returncode == 0, again.stderr

    for variant in ("dense_balanced", "demix"):
        workdir = tmp_path / variant
        trained = demix(
            "train", *flags, f"--config.variant={variant}", "--workdir", workdir, blocked=True
        )
        assert trained.returncode == 0, trained.stderr
        assert "step 4/4" in trained.stdout
        assert list((workdir / "tensorboard").iterdir())
    both = f"{tmp_path / 'dense_balanced'},{tmp_path / 'demix'}"
    evaluated = demix("evaluate", "--workdir", both, "--out", tmp_path / "out", blocked=True)
    assert evaluated.returncode == 0, evaluated.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 3 + 9
    assert "macro average" in evaluated.stdout


@pytest.mark.slow
def test_a_broken_line_is_named_and_can_be_skipped(config, tmp_path):
    for name in ("law", "med"):
        rows = [json.dumps({"text": text}) for text in tiny.sentences(name, 200)]
        if name == "med":
            rows[41] = '{"text": "no end'
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    flags = ["--config", config, f"--config.data.sources={tmp_path}", "--data_dir", tmp_path / "d"]
    line = failure("prepare", *flags)
    assert "med.jsonl:42: broken JSON" in line
    assert not (tmp_path / "d" / "med" / "meta.json").exists()
    done = demix("prepare", *flags, "--skip_bad_lines=1")
    assert done.returncode == 0, done.stderr
    assert "med              train         199" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experts"], "do what? `demix experts list`"),
        (["adapt", "--domain=a"], "--workdir is required; `demix adapt --help` lists all flags"),
        (["adapt", "--steps=0"], "flag --steps=0: 0 is not a positive integer"),
        (["train", "--stepz=0"], "Unknown command line flag 'stepz'"),
        (["trian"], "unknown verb 'trian'; did you mean 'train'"),
        (["train", "--config", "configs/quick.py", "--config.train.stepz=3", "--workdir", "w"],
         "unknown config key 'train.stepz'; did you mean 'train.steps'"),
        (["train", "--config", "configs/quick.py", "--config.variant=moe", "--workdir", "w"],
         "variant is 'moe'; choose from demix, dense, dense_balanced, domain_token"),
        (["train", "--config", "configs/quik.py", "--workdir", "w"],
         "config file 'configs/quik.py' does not exist"),
        (["train", "--config=configs/quik.py", "--config.train.steps=3", "--workdir", "w"],
         "config file 'configs/quik.py' does not exist"),
        (["prepare", "--config", "configs/quick.py", "--config.data.train_domains=pyton"],
         "unknown domain 'pyton'; did you mean 'python'"),
        (["train", "--config", "configs/quick.py", "--data_dir", "/nowhere", "--workdir", "w"],
         "/nowhere holds no prepared data"),
        (["evaluate", "--workdir", "/nowhere", "--out", "/tmp/out"], "/nowhere holds no run"),
        (["train", "--config", "configs/quick.py", "--config.train.steps=0", "--workdir", "w"],
         "train.steps must be 1 or more, not 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_status_2(arguments, message):
    assert message in failure(*arguments)


def test_usage_lists_the_verbs():
    done = demix("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("prepare", "train", "evaluate"))


def test_help_of_a_verb_lists_its_flags():
    done = demix("experts", "rename", "--help")
    assert done.returncode == 0
    flags = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert flags == ["--name", "--to", "--workdir"]


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid(config):
    namespace: dict = {}
    exec(compile(config.read_text(), config, "exec"), namespace)
    assert namespace["get_config"]().validate()
    assert "demix train" in namespace["__doc__"]
