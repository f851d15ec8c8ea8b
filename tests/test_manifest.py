"""The manifest: edits of it are pure functions, against what is written out by hand."""

import copy
import json
import math

import numpy as np
import pytest

from demix_jax.checkpoint.manifest import Manifest, Provenance, item_name, split_item_name
from demix_jax.errors import DemixError
from demix_jax.experts.lifecycle import average, check_weights

MANIFEST = Manifest(
    step=6,
    experts=("law", "med", "code"),
    hashes={
        "shared": "s", "optimizer.shared": "os",
        "expert.law": "l", "expert.med": "m", "expert.code": "c",
        "optimizer.law": "ol", "optimizer.med": "om", "optimizer.code": "oc",
        "best.shared": "bs", "best.law": "bl", "best.med": "bm", "best.code": "bc",
    },
    provenance={
        "law": Provenance("trained", "dense"),
        "med": Provenance("copied", "law"),
        "code": Provenance("merged", {"law": 0.5, "med": 0.5}),
    },
)  # fmt: skip


@pytest.fixture(autouse=True)
def unchanged():
    """No test may change it in place."""
    before = copy.deepcopy(MANIFEST)
    yield
    assert before == MANIFEST


def test_item_names_are_taken_apart_as_they_were_made():
    pairs = [(kind, expert) for kind in ("expert", "optimizer", "best") for expert in (None, "law")]
    names = [item_name(*pair) for pair in pairs]
    assert names == ["shared", "expert.law", "optimizer.shared", "optimizer.law", "best.shared",
                     "best.law"]  # fmt: skip
    assert [split_item_name(name) for name in names] == pairs


def test_json_comes_back_and_what_is_damaged_is_named():
    values = MANIFEST.to_json()
    assert Manifest.from_json(json.loads(json.dumps(values))) == MANIFEST
    with pytest.raises(ValueError, match="its values are not those of its 'digest'"):
        Manifest.from_json(values | {"step": 7})
    del values["digest"]  # manifests of older versions have none
    assert Manifest.from_json(values) == MANIFEST
    assert "best" not in values
    assert "formerly" not in values["provenance"]["law"]
    hashes = {n: h for n, h in values["hashes"].items() if n != "expert.med"}
    for damaged, message in (
        ([], r"it is \[\], not an object"),
        ({k: v for k, v in values.items() if k != "hashes"}, "it says nothing of expert.law"),
        (values | {"experts": "law"}, "'experts' is \"law\", not a list"),
        (values | {"hashes": hashes}, "it says nothing of expert.med"),
        (values | {"provenance": {}}, "it says nothing of law, med, code"),
        (values | {"provenance": {"law": {"how": 3}}}, "'provenance.law.how' is 3, not text"),
        (values | {"experts": []}, "it says nothing of experts"),
        (values | {"novelty": 1}, "'novelty' is not known to this version"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.from_json(json.loads(json.dumps(damaged)))


def test_an_added_expert_is_the_last_one():
    found = MANIFEST.with_expert("news", {"expert": "n", "optimizer": "on"}, Provenance("copied"))
    assert found.experts == ("law", "med", "code", "news")
    more = {"expert.news": "n", "optimizer.news": "on"}
    assert found.hashes == {**MANIFEST.hashes, **more}
    assert found.provenance == {**MANIFEST.provenance, "news": Provenance("copied")}


def test_an_added_expert_takes_the_place_it_had():
    for order, expected in (
        (["law", "new", "med", "code"], ("law", "new", "med", "code")),
        (["new", "gone", "law", "med", "code"], ("new", "law", "med", "code")),
        (["law", "new", "med"], ("law", "med", "code", "new")),  # code is new too
        (["med", "new", "law", "code"], ("law", "med", "code", "new")),  # another order
        (["law", "med", "code"], ("law", "med", "code", "new")),
        ([], ("law", "med", "code", "new")),
    ):
        found = MANIFEST.with_expert("new", {"expert": "n"}, Provenance(), order)
        assert found.experts == expected, order


def test_several_experts_come_back_in_any_order():
    order = ["law", "med", "code", "news", "chat"]
    for back in (["med", "news", "law"], ["law", "med", "news"], ["news", "law", "med"]):
        manifest = Manifest(experts=("code", "chat"))
        for name in back:
            manifest = manifest.with_expert(name, {"expert": "x"}, Provenance(), order)
        assert manifest.experts == tuple(order)


def test_a_removed_expert_takes_its_items_with_it():
    found = MANIFEST.without(["med"])
    assert found.experts == ("law", "code")
    gone = {"expert.med", "optimizer.med", "best.med"}
    assert found.hashes == {k: v for k, v in MANIFEST.hashes.items() if k not in gone}
    assert list(found.provenance) == ["law", "code"]
    assert found.step == 6


def test_removing_undoes_adding():
    added = MANIFEST.with_expert("news", {"expert": "n", "optimizer": "on"}, Provenance())
    assert added.without(["news"]) == MANIFEST


def test_a_renamed_expert_keeps_its_place_and_its_hashes():
    found = MANIFEST.renamed({"law": "acts", "code": "files"})
    assert found.experts == ("acts", "med", "files")
    assert sorted(found.hashes.values()) == sorted(MANIFEST.hashes.values())
    assert {k: found.hashes[k] for k in ("expert.acts", "optimizer.files", "best.acts")} == {
        "expert.acts": "l", "optimizer.files": "oc", "best.acts": "bl"}  # fmt: skip
    assert found.provenance["acts"].formerly == ("law",)
    again = found.renamed({"acts": "statutes"})
    assert again.provenance["statutes"].formerly == ("law", "acts")


def test_children_know_their_renamed_parent():
    found = MANIFEST.renamed({"law": "acts"}).provenance
    assert found["med"].parent == "acts"
    assert found["code"].parent == {"acts": 0.5, "med": 0.5}


def test_descendants_are_found_through_copies_and_averages():
    assert MANIFEST.descendants("law") == ["med", "code"]
    assert MANIFEST.descendants("med") == ["code"]
    assert MANIFEST.descendants("code") == []
    renamed = MANIFEST.renamed({"law": "acts", "med": "health"})
    assert renamed.descendants("acts") == ["health", "code"]


def test_what_cannot_be_done_is_refused():
    def add(name: str) -> Manifest:
        return MANIFEST.with_expert(name, {}, Provenance())

    for edit, argument, message in (
        (add, "med", "there is an expert 'med' already"),
        (add, "shared", "'shared' is taken"),
        (add, "dense", "'dense' is taken"),
        (add, "a/b", "'a/b' does not fit a path"),
        (add, "", "'' does not fit a path"),
        (add, "..", "'..' does not fit a path"),
        (MANIFEST.without, ["lwa"], "no expert 'lwa'; did you mean 'law'"),
        (MANIFEST.without, [""], "no expert ''"),
        (MANIFEST.without, ["law", "law"], "named 2 times"),
        (MANIFEST.without, ["law", "med", "code"], "no expert would be left"),
        (MANIFEST.renamed, {"lwa": "x"}, "no expert 'lwa'; did you mean 'law'"),
        (MANIFEST.renamed, {"law": "med"}, "there is an expert 'med' already"),
        (MANIFEST.renamed, {"law": "law"}, "there is an expert 'law' already"),
        (MANIFEST.renamed, {"law": "x", "med": "x"}, "named 2 times"),
        (MANIFEST.renamed, {"law": "shared"}, "'shared' is taken"),
    ):
        with pytest.raises(DemixError, match=message) as error:
            edit(argument)
        assert "\n" not in str(error.value)


def test_weights_must_be_an_average():
    for weights in ({"law": 0.5}, {"law": 1.5, "med": -0.5}, {"law": math.nan}, {"law": math.inf},
                    {}, {"law": 0.5, "med": 0.50001}, {"law": math.nan, "med": 1.0}):  # fmt: skip
        with pytest.raises(DemixError, match="must be in \\[0, 1\\] and sum to 1"):
            check_weights(weights)
    for weights in ({"law": 1.0}, {"law": 0.0, "med": 1.0}, dict.fromkeys("abc", 1 / 3)):
        check_weights(weights)


def test_an_average_is_taken_in_float64_and_rounded_once():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(3, 50)).astype(np.float32) for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    found = average(zip(weights, leaves, strict=True))
    exact = np.array(
        [
            math.fsum(w * float(x) for w, x in zip(weights, column, strict=True))
            for column in zip(*(leaf.ravel().tolist() for leaf in leaves), strict=True)
        ]
    ).reshape(3, 50)
    assert (found.dtype, found.shape) == (np.float32, (3, 50))
    np.testing.assert_array_equal(found, exact.astype(np.float32))
    rounded = sum(np.float32(w) * leaf for w, leaf in zip(weights, leaves, strict=True))
    assert (found != rounded).any()  # float32 sums would not do


def test_an_average_of_one_is_that_one_bit_for_bit():
    leaf = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    leaf[:4] = 0.0, -0.0, np.finfo(np.float32).tiny / 4, np.finfo(np.float32).max
    assert average([(1.0, leaf)]).tobytes() == leaf.tobytes()
