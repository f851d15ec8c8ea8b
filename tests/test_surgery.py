"""Edits of what a checkpoint says: pure functions, against what is written out by hand."""

import copy
import math

import numpy as np
import pytest

from demix_jax.checkpoint import manifest
from demix_jax.errors import DemixError

META = {
    "step": 6,
    "experts": ["law", "med", "code"],
    "hashes": {
        "shared": "s", "optimizer.shared": "os",
        "expert.law": "l", "expert.med": "m", "expert.code": "c",
        "optimizer.law": "ol", "optimizer.med": "om", "optimizer.code": "oc",
        "best.shared": "bs", "best.law": "bl", "best.med": "bm", "best.code": "bc",
    },
    "provenance": {
        "law": {"how": "trained", "parent": "dense"},
        "med": {"how": "copied", "parent": "law"},
        "code": {"how": "merged", "parent": {"law": 0.5, "med": 0.5}},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def meta():
    """What every test edits; no test may change it in place."""
    before = copy.deepcopy(META)
    yield META
    assert before == META


def test_an_added_expert_is_the_last_one():
    found = manifest.add(META, "news", {"": "n", "optimizer": "on"}, {"how": "copied"})
    assert found["experts"] == ["law", "med", "code", "news"]
    more = {"expert.news": "n", "optimizer.news": "on"}
    assert found["hashes"] == META["hashes"] | more
    assert found["provenance"] == META["provenance"] | {"news": {"how": "copied"}}


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [
        ("new", ["law", "new", "med", "code"], ["law", "new", "med", "code"]),
        ("new", ["new", "gone", "law", "med", "code"], ["new", "law", "med", "code"]),
        ("new", ["law", "new", "med"], ["law", "med", "code", "new"]),  # code is new too
        ("new", ["med", "new", "law", "code"], ["law", "med", "code", "new"]),  # another order
        ("new", [], ["law", "med", "code", "new"]),
    ],
)
def test_an_added_expert_takes_the_place_it_had(name, order, expected):
    assert manifest.add(META, name, {"": "n"}, {}, order)["experts"] == expected


def test_several_experts_come_back_in_any_order():
    order = ["law", "med", "code", "news", "chat"]
    for back in (["med", "news", "law"], ["law", "med", "news"], ["news", "law", "med"]):
        meta = META | {"experts": ["code", "chat"]}
        for name in back:
            meta = manifest.add(meta, name, {"": "x"}, {}, order)
        assert meta["experts"] == order


def test_a_removed_expert_takes_its_items_with_it():
    found = manifest.remove(META, ["med"])
    assert found["experts"] == ["law", "code"]
    gone = {"expert.med", "optimizer.med", "best.med"}
    assert found["hashes"] == {k: v for k, v in META["hashes"].items() if k not in gone}
    assert list(found["provenance"]) == ["law", "code"]
    assert found["step"] == 6


def test_removing_undoes_adding():
    added = manifest.add(META, "news", {"": "n", "optimizer": "on"}, {})
    assert manifest.remove(added, ["news"]) == META


def test_a_renamed_expert_keeps_its_place_and_its_hashes():
    found = manifest.rename(META, {"law": "acts", "code": "files"})
    assert found["experts"] == ["acts", "med", "files"]
    assert sorted(found["hashes"].values()) == sorted(META["hashes"].values())
    assert {k: found["hashes"][k] for k in ("expert.acts", "optimizer.files", "best.acts")} == {
        "expert.acts": "l", "optimizer.files": "oc", "best.acts": "bl"}  # fmt: skip
    assert found["provenance"]["acts"]["formerly"] == ["law"]
    again = manifest.rename(found, {"acts": "statutes"})
    assert again["provenance"]["statutes"]["formerly"] == ["law", "acts"]


def test_children_know_their_renamed_parent():
    found = manifest.rename(META, {"law": "acts"})["provenance"]
    assert found["med"]["parent"] == "acts"
    assert found["code"]["parent"] == {"acts": 0.5, "med": 0.5}


def test_descendants_are_found_through_copies_and_averages():
    assert manifest.descendants("law", META) == ["med", "code"]
    assert manifest.descendants("med", META) == ["code"]
    assert manifest.descendants("code", META) == []
    renamed = manifest.rename(META, {"law": "acts", "med": "health"})
    assert manifest.descendants("acts", renamed) == ["health", "code"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: manifest.add(META, "med", {}, {}), "there is an expert 'med' already"),
        (lambda: manifest.add(META, "shared", {}, {}), "'shared' is taken"),
        (lambda: manifest.add(META, "dense", {}, {}), "'dense' is taken"),
        (lambda: manifest.add(META, "a/b", {}, {}), "'a/b' does not fit a path"),
        (lambda: manifest.add(META, "", {}, {}), "'' does not fit a path"),
        (lambda: manifest.add(META, "..", {}, {}), "'..' does not fit a path"),
        (lambda: manifest.remove(META, ["lwa"]), "no expert 'lwa'; did you mean 'law'"),
        (lambda: manifest.remove(META, [""]), "no expert ''"),
        (lambda: manifest.remove(META, ["law", "law"]), "named 2 times"),
        (lambda: manifest.remove(META, ["law", "med", "code"]), "no expert would be left"),
        (lambda: manifest.rename(META, {"lwa": "x"}), "no expert 'lwa'; did you mean 'law'"),
        (lambda: manifest.rename(META, {"law": "med"}), "there is an expert 'med' already"),
        (lambda: manifest.rename(META, {"law": "law"}), "there is an expert 'law' already"),
        (lambda: manifest.rename(META, {"law": "x", "med": "x"}), "named 2 times"),
        (lambda: manifest.rename(META, {"law": "shared"}), "'shared' is taken"),
    ],
)
def test_what_cannot_be_done_is_refused(edit, message):
    with pytest.raises(DemixError, match=message) as error:
        edit()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weights",
    [{"law": 0.5}, {"law": 1.5, "med": -0.5}, {"law": math.nan}, {"law": math.inf}, {},
     {"law": 0.5, "med": 0.50001}, {"law": math.nan, "med": 1.0}],
)  # fmt: skip
def test_weights_that_are_no_average_are_refused(weights):
    with pytest.raises(DemixError, match="must be in \\[0, 1\\] and sum to 1"):
        manifest.check_weights(weights)


@pytest.mark.parametrize(
    "weights", [{"law": 1.0}, {"law": 0.0, "med": 1.0}, dict.fromkeys("abc", 1 / 3)]
)
def test_weights_that_are_an_average_pass(weights):
    manifest.check_weights(weights)


def test_an_average_is_taken_in_float64_and_rounded_once():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(3, 50)).astype(np.float32) for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    found = manifest.average(zip(weights, leaves, strict=True))
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
    assert manifest.average([(1.0, leaf)]).tobytes() == leaf.tobytes()
