"""Sites and skipped candidates as plain values and back; those of files from before there were codes."""

import json

import pytest

from fxquant import default_dynamic_qconfig
from fxquant.graph.plain import plain_site, plain_skipped, plain_unfused, read_site, read_skipped, read_unfused
from fxquant.graph.record import Site, Skipped, Unfused
from fxquant.graph.why import NotFused, Rounded, Why, because
from fxquant.qconfig_mapping import Entry, Setter

SITE = Site(
    path="lstm",
    kind="nn.LSTM",
    operator="lstm",
    qconfig=default_dynamic_qconfig,
    entry=Entry(Setter.MODULE_NAME_OBJECT_TYPE_ORDER, ("", "nn.LSTM", 0)),
    shape=(1, 2, 3),
    part_entries=(Entry(Setter.MODULE_NAME, ("lstm.weight_ih_l0",)), Entry(Setter.GLOBAL)),
    rounded=(Rounded.GPTQ, Rounded.NO_INPUT),
)
SKIPPED = Skipped(path="a", kind="nn.Linear", why=because(Why.REDEFINES, "A", "b, {c}"), entry=Entry(Setter.NONE))


def through_json(plain):
    return json.loads(json.dumps(plain))


def test_a_site_comes_back():
    assert read_site(through_json(plain_site(SITE))) == SITE


@pytest.mark.parametrize("why", Why)
def test_a_skipped_candidate_comes_back(why):
    skipped = Skipped(path="a", kind="nn.Linear", why=because(why, "{x}", 2), entry=Entry(Setter.GLOBAL))
    again = read_skipped(through_json(plain_skipped(skipped)))
    assert again == skipped
    assert again.reason == skipped.reason


def test_a_reason_is_told_with_its_details():
    assert SKIPPED.reason == "it is a subclass of A that redefines b, {c}"


def old(decision, **texts):
    """Return what a file from before codes holds of a decision: its sentences."""
    codes = ("entry", "part_entries", "rounded", "why")
    return {**{name: value for name, value in vars(decision).items() if name not in codes}, **texts}


@pytest.mark.parametrize(
    ("rounding", "rounded"),
    [
        ("", ()),
        ("with error feedback", (Rounded.GPTQ,)),
        ("with error feedback; to nearest: it met no input in data", (Rounded.GPTQ, Rounded.NO_INPUT)),
        ("to nearest: its inputs in data were not finite, or too large", (Rounded.NOT_FINITE,)),
    ],
)
def test_a_site_of_an_old_file_says_what_it_said(rounding, rounded):
    texts = {"rule": "global", "part_rules": ["module_name 'x'"], "rounding": rounding}
    site = read_site(old(SITE, **texts, qconfig=SITE.qconfig.to_dict()))
    assert (site.rule, site.part_rules, site.rounded) == ("global", ("module_name 'x'",), rounded)
    assert read_site(through_json(plain_site(site))) == site  # and may be saved again


def test_a_skipped_candidate_of_an_old_file_says_what_it_said():
    skipped = read_skipped(old(SKIPPED, rule="no entry", reason="it has {braces}"))
    assert (skipped.rule, skipped.reason, skipped.why.why) == ("no entry", "it has {braces}", Why.TOLD)
    assert read_skipped(through_json(plain_skipped(skipped))) == skipped


@pytest.mark.parametrize("why", NotFused)
def test_a_chain_that_was_not_fused_comes_back(why):
    unfused = Unfused(chain=("a", "b"), why=because(why, "{x}", 2))
    assert read_unfused(through_json(plain_unfused(unfused))) == unfused


def test_a_chain_of_an_old_file_says_what_it_said():
    unfused = read_unfused({"chain": ["a", "b"], "used": "a"})
    assert unfused == Unfused(chain=("a", "b"), why=because(NotFused.USED_BESIDE, "a"))
