"""One pulse test per command through its real entry point, and bad input: one line, exit 2."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import tiny
from forks import TENSORFLOW, demix

from demix_jax.config.schema import each_field, field_docs
from demix_jax.evaluation.settings import Settings as EvalSettings
from demix_jax.experts.settings import Settings as AdaptSettings

ROOT = Path(__file__).parent.parent
CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import tiny
def get_config():
    return tiny.config(pathlib.Path({data!r}), steps=4, branch_step=2)
"""


def interpreter(*arguments: object) -> subprocess.CompletedProcess:
    """Runs `demix` in a new interpreter where TensorFlow and SeqIO cannot be imported."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in TENSORFLOW)
    program = f"import sys\n{block}from demix_jax.cli.main import main\nmain()"
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
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
    prepared = interpreter("prepare", *flags)  # JSON lines need no TensorFlow
    assert prepared.returncode == 0, prepared.stderr
    assert "chat             novel         300" in prepared.stdout

    again = demix("prepare", *flags, blocked=TENSORFLOW)  # nothing to do
    assert again.returncode == 0, again.stderr

    for variant, run in (("dense_balanced", demix), ("demix", interpreter)):
        workdir = tmp_path / variant
        trained = run("train", *flags, f"--config.variant={variant}", "--workdir", workdir)
        assert trained.returncode == 0, trained.stderr
        assert "step 4/4" in trained.stdout
        assert list((workdir / "tensorboard").iterdir())
    both = f"{tmp_path / 'dense_balanced'},{tmp_path / 'demix'}"
    evaluated = interpreter("evaluate", "--workdir", both, "--out", tmp_path / "out")
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


BAD = [
    (["experts"], "do what? `demix experts list`"),
    (["adapt", "--domain=a"], "--workdir is required; `demix adapt --help` lists all flags"),
    (["adapt", "--steps=0"], "flag --steps=0: 0 is not a positive integer"),
    (["evaluate", "--tokens=-1"], "flag --tokens=-1: -1 is not a non-negative integer"),
    (["evaluate", "--workdir=w", "--out=o", "--top_k=1,x"],
     "--top_k takes whole numbers, not '1,x'"),
    (["evaluate", "--workdir=w", "--out=o", "--shard=1"], "--shard takes i/n, not '1'"),
    (["train", "--stepz=0"], "Unknown command line flag 'stepz'"),
    (["train", "--config.train.steps=3"], "overrides a config; give one too"),
    (["trian"], "unknown verb 'trian'; did you mean 'train'"),
    (["train", "--config", "configs/quick.py", "--config.train.stepz=3", "--workdir", "w"],
     "unknown config key 'train.stepz'; did you mean 'train.steps'"),
    (["train", "--config", "configs/quick.py", "--config.variant=moe", "--workdir", "w"],
     "variant is 'moe'; choose from demix, dense, dense_balanced, domain_token"),
    (["train", "--config", "configs/quik.py", "--workdir", "w"],
     "config file 'configs/quik.py' does not exist; did you mean 'quick'? (shipped configs: llama"),
    (["train", "--config=quik", "--config.train.steps=3", "--workdir", "w"],
     "config file 'quik' does not exist; did you mean 'quick'? (shipped configs: llama"),
    (["prepare", "--config", "configs/quick.py", "--config.data.train_domains=pyton"],
     "unknown domain 'pyton'; did you mean 'python'"),
    (["train", "--config", "configs/quick.py", "--data_dir", "/nowhere", "--workdir", "w"],
     "/nowhere holds no prepared data"),
    (["evaluate", "--workdir", "/nowhere", "--out", "/tmp/out"], "/nowhere holds no run"),
    (["train", "--config", "quick", "--config.train.steps=0", "--workdir", "w"],
     "train.steps must be 1 or more, not 0"),
]  # fmt: skip


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_status_2():
    for arguments, message in BAD:
        line = failure(*arguments)
        assert message in line, f"{arguments}: {line}"


def help_of(*verb: str) -> dict[str, str]:
    """The flags that the help of a verb lists, with what it says of each."""
    done = demix(*verb, "--help")
    assert done.returncode == 0, done.stderr
    text = re.sub(r"\n {20,}", " ", done.stdout)
    return dict(re.findall(r"^  --(\w+) +(.*)$", text, re.MULTILINE))


def test_help_lists_verbs_and_flags():
    done = demix("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("config", "prepare", "train", "evaluate"))

    flags = help_of("experts", "rename")
    assert list(flags) == ["name", "to", "workdir", "compilation_cache"]
    assert [about.startswith("(required) ") for about in flags.values()] == [True] * 3 + [False]

    flags = help_of("train")
    required = [name for name, about in flags.items() if about.startswith("(required)")]
    assert required == ["config", "workdir"]


def test_flags_of_settings_are_the_dataclass():
    for verb, settings, more in (
        ("evaluate", EvalSettings, {"workdir", "out", "before", "data_dir"}),
        ("adapt", AdaptSettings, {"workdir", "domain", "out", "parent", "add", "data_dir"}),
    ):
        flags, docs = help_of(verb), field_docs(settings)
        names = {field.name for field in dataclasses.fields(settings)}
        assert set(docs) == names, verb
        assert names | more <= set(flags), verb
        for name in names:
            assert docs[name][1:] in flags[name], f"{verb} --{name}: {flags[name]}"
    assert flags["steps"].endswith("(default: 1000)")
    assert flags["learning_rate"].endswith("(default: 0.0)")


READ = """
from absl import flags
from demix_jax.cli.settings_flags import define_settings, read_settings
from demix_jax.evaluation.settings import Settings
define_settings(Settings, without=["shard"])
flags.FLAGS(["demix", *{arguments}])
print(read_settings(Settings, shard=(1, 2)))
"""


def test_flags_are_read_into_settings():
    given = ["--top_k=0,2", "--switch_rates=0.5", "--tokens=7", "--split=valid", "--refresh_priors"]
    expected = {
        (): EvalSettings(shard=(1, 2)),
        tuple(given): EvalSettings(
            top_k=(0, 2),
            switch_rates=("0.5",),
            tokens=7,
            split="valid",
            refresh_priors=True,
            shard=(1, 2),
        ),
    }
    for arguments, settings in expected.items():
        done = forks.python(READ.format(arguments=arguments))
        assert done.stdout.strip() == repr(settings), done.stderr


def test_config_lists_every_field_with_its_value_and_meaning():
    done = demix("config", "--config", "quick", "--config.train.steps=500")
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^([a-z_]+(?:\.\w+)?) +(.+)$", done.stdout, re.MULTILINE))
    namespace: dict = {}
    exec((ROOT / "configs" / "quick.py").read_text(), namespace)
    for key, section, field in each_field(namespace["get_config"]()):
        value = 500 if key == "train.steps" else getattr(section, field.name)
        assert field_docs(type(section))[field.name] in lines[key]
        assert isinstance(value, tuple | str) or f" {value!r} " in lines[key], key
        assert lines[key].startswith("* ") == bool(field.metadata.get("free")), key
    defaults = demix("config")
    assert re.search(r"^model.layers +int +12 ", defaults.stdout, re.MULTILINE)


def test_shipped_configs_are_found_from_anywhere(tmp_path):
    """By name and as configs/NAME.py, unless there is such a file."""
    for path in ("quick", "configs/quick.py"):
        done = demix("config", "--config", path, folder=tmp_path)
        assert re.search(r"^model.width +int +128 ", done.stdout, re.MULTILINE), done.stderr
    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "quick.py").read_text()
    (tmp_path / "configs" / "quick.py").write_text(text.replace("width=128", "width=64"))
    done = demix("config", "--config=configs/quick.py", folder=tmp_path)
    assert re.search(r"^model.width +int +64 ", done.stdout, re.MULTILINE), done.stderr


def test_every_config_is_valid():
    for path in sorted((ROOT / "configs").glob("*.py")):
        namespace: dict = {}
        exec(compile(path.read_text(), path, "exec"), namespace)
        assert namespace["get_config"]().validate(), path
        assert "demix train" in namespace["__doc__"], path
