"""Tests of patterns from files: usual ones match as PEFT's do, none runs for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastadapt as fa
from fastadapt.patterns import check_patterns, match_end

NAMES = [f"blocks.{i}.attention.self.query_projection.aaaaaaaaaaaaaaaaaaa!" for i in range(20)]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("fc1", "blocks.0.mlp.fc1", True),
        ("c1", "blocks.0.mlp.fc1", False),
        ("blocks.0.attn.qkv", "blocks.0.attn.qkv", True),
        (r"blocks\.(0|1|2)\..*", "blocks.2.mlp.fc1", True),
        (r"blocks\.(0|1|2)\..*", "blocks.12.mlp.fc1", False),
        (r".*\.layers\.[0-9]+\.fc[12]", "encoder.layers.10.fc2", True),
        ("(q|k|v)_proj", "a.q_proj", True),
        ("layer_?norm(1|2)?", "a.layernorm2", True),
    ],
)
def test_usual_patterns(pattern, name, matches):
    check_patterns([pattern], [name] * 500)
    assert match_end(pattern, name) == matches


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(a+)+b", "repeats a group"),
        ("(a|a)*b", "repeats a group"),
        ("(?:a*)*b", "repeats a group"),
        ("(.{1,30}){1,30}b", "repeats a group"),
        ("((((a)+)+)+)+b", "repeats a group"),
        ("a?" * 30 + "a" * 30, "steps"),
        ("(a|a)" * 20, "steps"),
        (".*" * 8 + "b", "steps"),
        ("(?=a)", "special group"),
        (r"(a)\1", "back reference"),
        ("[", "no regular expression"),
        (")|(", "no regular expression"),
        ("a" * 1000, "1000 characters"),
        (7, "no regular expression"),
    ],
)
def test_patterns_without_a_bound_are_refused(pattern, says):
    with pytest.raises(fa.InputError, match=says):
        check_patterns([pattern], NAMES)


def test_many_patterns_count_together():
    check_patterns(["blocks.0.attn.qkv.*"] * 100, NAMES)
    with pytest.raises(fa.InputError, match="steps"):
        check_patterns([f"a.*{i}.*b" for i in range(2000)], NAMES)


@given(st.lists(st.sampled_from([*"a.*+?()|b", "{2,9}", "[a-z]", r"\d", "(?:", "a*"]), max_size=14))
@settings(deadline=None, max_examples=300)
def test_random_patterns_are_refused_or_end(parts):
    pattern = "".join(parts)
    try:
        check_patterns([pattern], NAMES)
    except fa.InputError:
        return
    for name in NAMES:
        match_end(pattern, name)
