"""The formats and codings that Accept headers ask for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.http.accept import ARROW, prefers_arrow, prefers_gzip, prefers_openmetrics


@pytest.mark.parametrize(
    ("accept", "arrow"),
    [
        (ARROW, True),
        (ARROW.upper(), True),
        (f"{ARROW}; q=0.001", True),
        (f"{ARROW};x=y;q=1.000", True),
        (f"{ARROW}, application/json;q=0.9, */*;q=0.1", True),
        (f"application/json;q=0.5,{ARROW};q=0.6", True),
        (f"text/html, {ARROW}", True),
        (f"{ARROW}, */*;q=0.5", True),
        (f"{ARROW};q=0.5, application/json;q=0.1, */*", True),
        (f"{ARROW};q=0, {ARROW}", True),
        ("", False),
        ("*/*", False),
        ("application/*", False),
        ("*/*, application/json;q=0", False),
        ("application/json", False),
        ("text/html", False),
        ("application/vnd.apache.arrow.file", False),
        (f"{ARROW}x", False),
        (f"{ARROW}, application/json", False),
        (f"{ARROW}, */*", False),
        (f"{ARROW};q=0.5, */*", False),
        (f"{ARROW};q=0.5, application/*;q=0.6", False),
        (f"{ARROW};q=0", False),
        (f"{ARROW};q=nan", False),
        (f"{ARROW};q=1.5", False),
        (f"{ARROW};q=0.1234", False),
        (f"{ARROW};q=-1", False),
    ],
)
def test_arrow_is_preferred_only_by_name_and_above_json(accept: str, arrow: bool) -> None:
    assert prefers_arrow(accept) is arrow


@pytest.mark.parametrize(
    ("accept", "gzip"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("x-gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1, gzip;q=0.2", True),
        ("*", True),
        ("*;q=0.1", True),
        ("identity;q=0.5, gzip", True),
        ("gzip, identity", True),
        ("gzip;q=0, gzip", True),
        ("", False),
        ("br", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("gzip;q=0, *", False),
        ("*;q=0", False),
        ("identity, gzip;q=0.9", False),
        ("gzip;q=2", False),
        ("gzipped", False),
    ],
)
def test_gzip_is_used_unless_refused_or_ranked_below_identity(accept: str, gzip: bool) -> None:
    assert prefers_gzip(accept) is gzip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["application/openmetrics-text", ARROW, "application/json", *";q=,1*/"])
    ).map("".join)
)
def test_any_header_is_accepted(accept: str) -> None:
    assert prefers_openmetrics(accept) in (True, False)
    assert prefers_arrow(accept) in (True, False)
    assert prefers_gzip(accept) in (True, False)
