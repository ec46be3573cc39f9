"""The URLs that the server may read for a caller."""

from __future__ import annotations

import pytest

from service.source_urls import is_allowed, split_url, without_query

PREFIXES = ["https://data.example/files", "s3://bucket/texts/", "http://127.0.0.1:9000/"]


@pytest.mark.parametrize(
    "url",
    [
        "https://data.example/files/a.csv",
        "https://DATA.example:443/files/a.csv?signature=x",
        "https://data.example/files/deep/er/a%20b.csv",
        "s3://bucket/texts/a.parquet",
        "http://127.0.0.1:9000/any.jsonl",
    ],
)
def test_urls_below_a_prefix_are_allowed(url: str) -> None:
    assert is_allowed(url, PREFIXES)


@pytest.mark.parametrize(
    "url",
    [
        "https://data.example/files-of-others/a.csv",
        "https://data.example/a.csv",
        "https://data.example:8443/files/a.csv",
        "https://data.example.evil/files/a.csv",
        "http://data.example/files/a.csv",
        "s3://bucket/other/a.csv",
        "s3://BUCKET/texts/a.csv",
        "http://127.0.0.1:9001/any.jsonl",
    ],
)
def test_other_urls_are_not_allowed(url: str) -> None:
    assert not is_allowed(url, PREFIXES)


@pytest.mark.parametrize(
    "url",
    [
        "https://data.example/files/../secret.csv",
        "https://data.example/files/./a.csv",
        "https://data.example/files/%2e%2e/secret.csv",
        "https://data.example/files/%252e%252e/secret.csv",
        "https://data.example/files/..%2fsecret.csv",
        "https://data.example/files//a.csv",
        "https://data.example@evil.example/files/a.csv",
        "https://user:word@data.example/files/a.csv",
        "https://data.example\\@evil.example/files/a.csv",
        "https://data.example/files\\..\\secret.csv",
        "https://data.example/files/a.csv#part",
        "https://data.example/files/a\n.csv",
        "https://data.example/files/ä.csv",
        "HTTPS://data.example/files/a.csv",
        "simplecache::https://data.example/files/a.csv",
        "https://data.example/files/a.zip::https://evil.example/a.csv",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "local://here/etc/passwd",
        "memory://here/a.csv",
        "/etc/passwd",
        "etc/passwd",
        "https:data.example/files/a.csv",
        "",
    ],
)
def test_ambiguous_and_local_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL|path|server itself"):
        is_allowed(url, PREFIXES)


def test_no_url_is_allowed_without_a_prefix() -> None:
    assert not is_allowed("https://data.example/files/a.csv", [])


def test_a_prefix_may_be_a_whole_host() -> None:
    assert split_url("https://data.example") == split_url("https://data.example/")
    assert is_allowed("https://data.example/a.csv", ["https://data.example"])


def test_without_query_removes_the_query() -> None:
    assert without_query("https://data.example/a.csv?signature=x") == "https://data.example/a.csv"
