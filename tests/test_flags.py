"""Flags of all verbs: empty ones, paths spelled in any way, and outputs refused beforehand."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).parent.parent
# Runs each of many commands in a fork.
DRIVER = """
import json, os, sys
from absl import flags
from demix_jax.cli import main as cli
os.dup2(1, 2)
for arguments in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        status = 0
        try:
            if isinstance(arguments, str):
                names = cli._define(cli._VERBS[arguments])
                print(json.dumps({n: flags.FLAGS[n].boolean for n in sorted(names)}))
            else:
                sys.argv = ["demix", *arguments]  # where overrides of a config are looked for
                cli.main()
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
    print(f"status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
"""


def answers(commands: Sequence[Sequence[str] | str], folder: Path) -> list[tuple[int, str]]:
    """Exit status and output of each command; of the name of a verb, its flags."""
    done = forks.python(DRIVER, json.dumps(commands), folder=folder, HOME=str(folder))
    assert done.returncode == 0, done.stdout
    *parts, rest = re.split(r"^status (-?\d+)\n", done.stdout, flags=re.MULTILINE)
    assert not rest
    return [(int(parts[i + 1]), parts[i]) for i in range(0, len(parts), 2)]


@pytest.mark.slow
def test_an_empty_flag_is_refused_in_every_verb_before_anything_is_written(tmp_path):
    from demix_jax.cli.main import _VERBS

    names = [json.loads(text) for _, text in answers(list(_VERBS), tmp_path)]
    commands, flags = [], []
    for (verb, known), own in zip(_VERBS.items(), names, strict=True):
        for name in (name for name, is_bool in own.items() if not is_bool):
            others = [
                f"--{n}={'quick' if n == 'config' else 'x'}" for n in known.required if n != name
            ]
            commands += [[*verb.split(), *others, f"--{name}", value] for value in ("", " ")]
            flags += [name] * 2
    for command, flag, (status, text) in zip(
        commands, flags, answers(commands, tmp_path), strict=True
    ):
        assert status == 2, command
        assert re.search(
            rf"error: (--{flag} is empty: is a variable not set|flag --{flag}=)", text
        ), text
        assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


REFUSED = [
    ("experts remove --workdir=w --name=a,,b", "--name has an empty entry ('a,,b')"),
    ("experts remove --workdir=w --name=,b", "--name has an empty entry (',b')"),
    ("evaluate --workdir=a,,b --out=o", "--workdir has an empty entry"),
    ("config --config=quick --config.data.tokenizer=", "--config.data.tokenizer is empty"),
    ("config --config=quick --config.data.train_domains=", "--config.data.train_domains is empty"),
    ("config --config=quick --config.data.train_domains=a,,b", "'a,,b' has an empty entry"),
    ("config --config=quick --config.train.branch_from=", "--config.train.branch_from is empty"),
    ("config --config=", "--config is empty"),
    ("config --config=quick --noconfig.model.foo", "unknown config key 'model.foo'"),
    ("config --config=quick --config.model.foo", "unknown config key 'model.foo'"),
    ("config --config=quick --config.train.seed=4294967296", "must be 4294967295 or less"),
    ("score --workdir=w --input=i --output=folder", "folder is a folder; name a file"),
    ("score --workdir=w --input=i --output=new/", "new/ is a folder; name a file"),
    ("score --workdir=w --input=i --output=file/x", "file is no folder"),
    ("plan --config=quick --devices=1 --out=folder", "folder is a folder; name a file"),
    ("experts export --workdir=w --name=a --output=file", "file is a file; name a folder"),
    ("train --config=quick --workdir=file", "file is a file; name a folder"),
    ("evaluate --workdir=w --out=file", "file is a file; name a folder"),
    ("report --results=r --out=file", "file is a file; name a folder"),
    ("adapt --workdir=w --domain=a --out=file", "file is a file; name a folder"),
    ("materialize --workdir=w --out=file", "file is a file; name a folder"),
    ("train --config=quick --workdir=gs://bucket/w", "gs://bucket/w is not on this machine"),
    ("evaluate --workdir=w,s3://bucket/w --out=o", "s3://bucket/w is not on this machine"),
    ("experts list --workdir=~nobody-here/w", "there is no home of '~nobody-here'"),
]  # fmt: skip


@pytest.mark.slow
def test_what_cannot_be_meant_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    found = answers([command.split() for command, _ in REFUSED], tmp_path)
    for (command, message), (status, text) in zip(REFUSED, found, strict=True):
        assert (status, message in text, "Traceback" in text) == (2, True, False), (command, text)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("typed", ["d", "./d/", "~/d", "file://{home}/d", "link", "{home}/x/../d"])
def test_paths_of_a_configuration_are_places(typed, tmp_path, monkeypatch):
    from demix_jax.config.schema import Config, DataConfig, TrainConfig
    from demix_jax.config.serialization import differences, resolve_paths

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    typed = typed.format(home=tmp_path)
    config = Config(data=DataConfig(dir=typed), train=TrainConfig(branch_step=1, branch_from=typed))
    saved = Config(train=TrainConfig(branch_step=1, branch_from="d"))
    assert not differences(saved, config)
    resolved = resolve_paths(config)
    assert resolved.data.dir == resolved.train.branch_from == str(tmp_path / "d")
    assert differences(Config(), resolved) != []


def test_flags_resolve_paths_and_a_comma_at_the_end_means_nothing(tmp_path):
    (tmp_path / "c.py").write_text((ROOT / "configs" / "quick.py").read_text())
    flags = ["--config=~/c.py", "--data_dir=~/d/", "--config.data.sources", "embedded,"]
    remote = ["--config=file://c.py", "--data_dir=gs://bucket/d", "--config.data.train_domains=()"]
    (one, text), (two, other) = answers([["config", *flags], ["config", *remote]], tmp_path)
    assert one == two == 0, text + other
    assert re.search(rf"^data.dir \* +str +{tmp_path}/d ", text, re.MULTILINE), text
    assert re.search(r"^data.sources \* +list +embedded ", text, re.MULTILINE), text
    assert re.search(r"^data.dir \* +str +gs://bucket/d ", other, re.MULTILINE), other
