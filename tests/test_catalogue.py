"""The paper's sixteen domains name things that the installed TFDS catalogue has; no network.

What only a built dataset knows (how many examples a split has) is not known here. The names of the
splits are: they are read from the code of each builder.
"""

import ast
import functools
import inspect
import re
import runpy
import socket
import textwrap
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from cases import case

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOWHERE = str(ROOT / "no_such_folder")  # what is asked for is the code, not what is prepared here
EXAMPLES = 100_000  # a made-up size: enough for slices of a percent
OPTIONS = {"field", "where", "train", "valid", "test"}


def load(name):
    return runpy.run_path(str(ROOT / "configs" / name))["get_config"]().validate()


DATA = load("paper_data.py").data
PLACES = dict(source.split("=", 1) for source in DATA.sources)
DATASETS = {name: place for name, place in PLACES.items() if place.startswith("tfds:")}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@functools.cache
def builder_of(address):
    return tfds.builder(address, data_dir=NOWHERE)


def faults(place):
    """What is wrong with `tfds:NAME/CONFIG:VERSION?options`: one line for each."""
    address, _, query = place.removeprefix("tfds:").partition("?")
    pairs = [pair.partition("=")[::2] for pair in query.split("&") if pair]
    try:
        builder = builder_of(address)
    except (ValueError, AssertionError, tfds.core.DatasetNotFoundError) as error:
        return [f"{address}: {error}"]
    found = [f"option {key}" for key, _ in pairs if key not in OPTIONS]
    if str(builder.version) != address.rpartition(":")[2]:
        found.append(f"{address}: which version? it has {builder.version}")
    if builder.builder_configs and "/" not in address:
        found.append(f"{address}: which config? it has {', '.join(builder.builder_configs)}")
    fields = [value for key, value in pairs if key == "field"] or ["text"]
    found += [f"field {f} is no text" for f in fields if not is_text(feature(builder, f))]
    wheres = [value.partition(":") for key, value in pairs if key == "where"]
    found += [
        f"where {name}{colon}{values}"
        for name, colon, values in wheres
        if not values or getattr(feature(builder, name), "shape", None) != ()
    ]
    return found + split_faults(
        builder, {k: v for k, v in pairs if k in OPTIONS - {"field", "where"}}
    )


def feature(builder, path):
    """The feature at `a/b`, or None."""
    found = builder.info.features
    for name in path.split("/"):
        if not isinstance(found, tfds.features.FeaturesDict) or name not in found:
            return None
        found = found[name]
    return found


def is_text(found):
    return found is not None and found.shape == () and found.np_dtype in (object, str)


def split_faults(builder, slices):
    """Splits that the builder does not make, and examples that two of ours would share."""
    infos = tfds.core.splits.SplitDict(
        tfds.core.SplitInfo(name=name, shard_lengths=[EXAMPLES], num_bytes=0)
        for name in split_names(builder)
    )
    found, taken = [], {}
    for ours, spec in slices.items():
        try:
            pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
        except (ValueError, KeyError) as error:
            found.append(f"{ours}={spec}: {error}")
            continue
        examples = {
            (piece.splitname, i)
            for piece in pieces
            for i in range(piece.from_ or 0, EXAMPLES if piece.to is None else piece.to)
        }
        if not examples:
            found.append(f"{ours}={spec} is empty")
        found += [f"{ours} and {other} overlap" for other, of in taken.items() if of & examples]
        taken[ours] = examples
    return found


def split_names(builder):
    """The splits that the builder's own code names."""
    source = textwrap.dedent(inspect.getsource(type(builder)._split_generators))
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            keys = node.value.keys
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("SplitGenerator"):
            keys = [word.value for word in node.keywords if word.arg == "name"]
        else:
            continue
        names |= {key.value for key in keys if isinstance(key, ast.Constant)}
        marks = [key.attr for key in keys if isinstance(key, ast.Attribute)]
        names |= {str(getattr(tfds.Split, mark)) for mark in marks}
    return sorted(names)


def test_eight_and_eight():
    assert len(set(DATA.train_domains)) == len(DATA.train_domains) == 8
    assert len(set(DATA.novel_domains)) == len(DATA.novel_domains) == 8
    assert not set(DATA.train_domains) & set(DATA.novel_domains)
    assert list(PLACES) == [*DATA.train_domains, *DATA.novel_domains]
    assert len(DATA.sources) == len(set(PLACES.values())) == 16
    assert len(DATASETS) == 11


def test_the_catalogue_has_it():
    for name in DATASETS:
        with case(name):
            assert faults(DATASETS[name]) == []


def test_preparing_it_can_begin():
    for name in DATASETS:
        with case(name):
            address = DATASETS[name].removeprefix("tfds:").partition("?")[0]
            builder = builder_of(address)
            assert all(info.checksum for info in (builder.url_infos or {}).values())


def test_every_split_is_named():
    for name in DATASETS:
        with case(name):
            for split in ("train", "valid", "test"):
                assert re.search(rf"[?&]{split}=", DATASETS[name])


def test_a_wrong_name_is_found():
    for place, fault in [
        ("tfds:lm1c:1.1.0", "lm1c"),
        ("tfds:scientific_papers/arxif:1.1.1?field=article", "arxif"),
        ("tfds:scientific_papers:1.1.1?field=article", "which config"),
        ("tfds:lm1b:1.2.0", "1.2.0"),
        ("tfds:lm1b", "which version"),
        ("tfds:scientific_papers/arxiv:1.1.1", "field text"),
        ("tfds:yelp_polarity_reviews:0.2.0?field=label", "field label"),
        ("tfds:covid19sum:1.0.0?field=body_text/text", "field body_text/text"),
        ("tfds:amazon_us_reviews/Books_v1_02:0.1.0?field=data/review", "field data/review"),
        ("tfds:reddit:1.0.0?field=body&where=forum:aww", "where forum"),
        ("tfds:reddit:1.0.0?field=body&where=subreddit", "where subreddit"),
        ("tfds:lm1b:1.1.0?valid=validation", "valid=validation"),
        ("tfds:lm1b:1.1.0?train=train[:x%]", "train=train[:x%]"),
        ("tfds:lm1b:1.1.0?train=train&test=train[99%:]", "overlap"),
        ("tfds:lm1b:1.1.0?test=test[100%:]", "empty"),
        ("tfds:lm1b:1.1.0?dev=test", "option dev"),
    ]:
        with case(place, fault):
            assert fault in "; ".join(faults(place))


def test_nested_fields_and_conditions_are_understood():
    for place in [
        "tfds:amazon_us_reviews/Books_v1_02:0.1.0?field=data/review_body",
        "tfds:reddit:1.0.0?field=body&where=subreddit:aww|pics&where=author:me&train=train[:5%]",
    ]:
        with case(place):
            assert faults(place) == []


def test_the_paper_s_models_train_on_what_this_prepares():
    others = [path.name for path in (ROOT / "configs").glob("paper_*m.py")]
    assert len(others) == 4
    for name in others:
        config = load(name)
        assert config.data.dir == DATA.dir
        assert config.data.tokenizer == DATA.tokenizer
        assert config.data.train_domains in ((), DATA.train_domains)


def test_the_documentation_has_a_row_for_every_domain():
    text = (ROOT / "docs" / "data.md").read_text()
    section = text.split("## The paper's sixteen domains")[1].split("\n## ")[0]
    for name, place in PLACES.items():
        address = place.removeprefix("tfds:").partition("?")[0]
        row = re.search(rf"^\| {name} \|.*$", section, re.MULTILINE)
        assert row
        assert f"`{address}`" in row[0], address
