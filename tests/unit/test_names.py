"""Names: what may become a path component of the store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import StoreError
from rewarm.naming import is_name
from rewarm.store.names import check_name, check_namespace

GOOD = ["a", "llama-8b", "Llama_3.1", "0", "_x", "a" * 128, "a.b", "x-"]
BAD = [
    ("", "is empty"),
    ("/", "holds '/'"),
    ("a/b", "holds '/'"),
    ("..", "begins with '.'"),
    (".", "begins with '.'"),
    (".hidden", "begins with '.'"),
    ("-rf", "begins with '-'"),
    ("a..b", "holds '..'"),
    ("a" * 129, "has 129 characters"),
    ("a" * 300, "has 300 characters"),
    ("a\n", r"holds '\n'"),
    ("a\nb", r"holds '\n'"),
    ("a\0b", r"holds '\x00'"),
    ("größe", "holds 'ö'"),
    ("a b", "holds ' '"),
    ("\u0663", "holds"),
]


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert check_name(name) == name
    assert check_namespace(name) == name


@pytest.mark.parametrize(("name", "cause"), BAD)
def test_bad_names_are_refused_with_the_cause(name: str, cause: str) -> None:
    assert not is_name(name)
    for check, kind in ((check_name, "snapshot name"), (check_namespace, "namespace")):
        with pytest.raises(StoreError) as caught:
            check(name)
        message = str(caught.value)
        assert kind in message
        assert cause in message
        assert "use 1 to 128 of" in message
        assert "\n" not in message
        assert len(message) < 300


@given(st.text(max_size=200))
def test_a_name_is_one_component_that_stays_where_it_is(text: str) -> None:
    if is_name(text):
        assert "/" not in text
        assert "\0" not in text
        assert text not in (".", "..")
        assert len(text.encode()) <= 128
        assert text.isascii()
