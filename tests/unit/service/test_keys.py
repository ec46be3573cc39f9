"""API keys: new keys, key files, reloads, limits, and when keys are required."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.keys import (
    ANONYMOUS,
    MAX_KEYS,
    POLL_SECONDS,
    Key,
    KeyRing,
    KeysError,
    check_keys,
    digest,
    key_line,
    new_key,
    read_keys,
)
from service.settings import Settings, SettingsError
from tests.support.command_line import CommandLine


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(secret: str, *scopes: str, **limits: Any) -> Key:
    return Key.model_validate(
        {"sha256": digest(secret.encode()), "scopes": scopes or ("classify",), **limits}
    )


def write(path: Path, **keys: Key) -> Path:
    """Write a key file, or replace it."""
    part = path.with_suffix(".part")
    part.write_text("".join(f"{key_line(name, kept)}\n" for name, kept in keys.items()))
    part.replace(path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.toml", web=key("one"), ops=key("two", "admin"))


class TestNew:
    def test_the_line_accepts_the_secret_without_containing_it(
        self, command: CommandLine, tmp_path: Path
    ) -> None:
        outcome = command("keys", "new", "web", "--scope", "classify", "--scope", "admin")
        secret = outcome.err.splitlines()[-1]
        assert outcome.code == 0
        assert secret.startswith("bf_")
        assert len(secret) > 40
        assert secret not in outcome.out
        path = tmp_path / "keys.toml"
        path.write_text(outcome.out)
        caller = KeyRing({}, path).find(secret.encode())
        assert caller is not None
        assert (caller.name, caller.scopes) == ("web", {"classify", "admin"})

    def test_the_line_has_the_limits(self, command: CommandLine, tmp_path: Path) -> None:
        limits = ("--texts-per-second", "2.5", "--burst", "9", "--max-requests", "3")
        path = tmp_path / "keys.toml"
        path.write_text(command("keys", "new", "web", *limits).out)
        kept = read_keys(path)["web"]
        assert (kept.texts_per_second, kept.burst, kept.max_requests) == (2.5, 9, 3)

    def test_keys_are_unique(self) -> None:
        assert len({new_key(["classify"])[0] for _ in range(100)}) == 100

    @pytest.mark.parametrize(
        "arguments",
        [
            ("web", "--scope", "everything"),
            ("web", "--burst", "0"),
            ("web", "--texts-per-second", "-1"),
            ("two words",),
            ("../up",),
            (ANONYMOUS,),
            ("x" * 65,),
        ],
        ids=" ".join,
    )
    def test_invalid_options_are_one_line(
        self, command: CommandLine, arguments: tuple[str, ...]
    ) -> None:
        command("keys", "new", *arguments).complaint()


class TestFile:
    @pytest.mark.parametrize(
        "text",
        [
            "web",
            "web = 5",
            "web = {}",
            'web = { sha256 = "abc" }',
            'web = { sha256 = "' + "A" * 64 + '" }',
            'web = { sha256 = "' + "a" * 64 + '", scopes = [] }',
            'web = { sha256 = "' + "a" * 64 + '", scopes = ["all"] }',
            'web = { sha256 = "' + "a" * 64 + '", texts_per_second = 0 }',
            'web = { sha256 = "' + "a" * 64 + '", texts_per_second = nan }',
            'web = { sha256 = "' + "a" * 64 + '", key = "bf_in_the_clear" }',
            '"a b" = { sha256 = "' + "a" * 64 + '" }',
            'web = { sha256 = "' + "a" * 64 + '" }\nweb = { sha256 = "' + "b" * 64 + '" }',
            'web = { sha256 = "' + "a" * 64 + '" }\nops = { sha256 = "' + "a" * 64 + '" }',
            "x = " + "[" * 100_000,
            "\n".join(f'k{i} = {{ sha256 = "{i:064x}" }}' for i in range(MAX_KEYS + 1)),
        ],
        ids=lambda text: text[:40],
    )
    def test_an_invalid_file_is_one_line_that_names_it(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "keys.toml"
        path.write_text(text)
        with pytest.raises(KeysError) as caught:
            read_keys(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        assert "in_the_clear" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b"#" * (2**20 + 1)], ids=range(3))
    def test_a_file_that_is_not_text_or_too_large_is_refused(
        self, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "keys.toml"
        path.write_bytes(content)
        with pytest.raises(KeysError):
            read_keys(path)

    def test_an_empty_file_has_no_keys(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.toml"
        path.write_text("")
        assert read_keys(path) == {}

    def test_a_missing_file_is_one_line(self, command: CommandLine, tmp_path: Path) -> None:
        missing = tmp_path / "none.toml"
        line = command("serve", "--port=0", f"--keys-file={missing}").complaint()
        assert str(missing) in line


class TestRing:
    def test_each_secret_finds_its_name(self, file: Path) -> None:
        ring = KeyRing({"third": key("three")}, file)
        found = {s: getattr(ring.find(s.encode()), "name", None) for s in ("one", "two", "three")}
        assert found == {"one": "web", "two": "ops", "three": "third"}

    @pytest.mark.parametrize(
        "secret", [None, b"", b"One", b"one ", b"\xff", digest(b"one").encode()]
    )
    def test_an_unknown_secret_finds_no_caller(self, file: Path, secret: bytes | None) -> None:
        assert KeyRing({}, file).find(secret) is None

    @pytest.mark.parametrize("secret", [None, b"", b"wrong"])
    def test_unknown_callers_are_anonymous_if_allowed(
        self, file: Path, secret: bytes | None
    ) -> None:
        ring = KeyRing({}, file, anonymous=True)
        caller = ring.find(secret)
        assert caller is not None
        assert caller.name == ANONYMOUS
        assert ring.opens(caller, "classify")
        assert not ring.opens(caller, "admin")

    def test_a_name_in_file_and_settings_is_refused(self, file: Path) -> None:
        with pytest.raises(KeysError, match="web"):
            KeyRing({"web": key("other")}, file)

    def test_a_changed_file_is_reloaded(self, file: Path) -> None:
        clock, reported = Clock(), []

        def changed(names: Collection[str]) -> None:
            reported.append(sorted(names))

        ring = KeyRing({}, file, clock=clock, changed=changed)
        write(file, web=key("fresh"), more=key("three"))
        assert ring.find(b"one") is not None
        clock.now += POLL_SECONDS
        assert ring.find(b"one") is None
        assert ring.find(b"fresh") is not None
        assert ring.find(b"two") is None
        assert reported == [["ops", "web"], ["more", "web"]]

    def test_an_invalid_change_keeps_the_keys_and_is_logged_once(self, file: Path) -> None:
        clock = Clock()
        ring = KeyRing({}, file, clock=clock)
        file.write_text("web = 5\n")
        with capture_logs() as lines:
            for _ in range(5):
                clock.now += POLL_SECONDS
                assert ring.find(b"one") is not None
        assert [line["event"] for line in lines] == ["keys not reloaded"]
        file.unlink()
        clock.now += POLL_SECONDS
        assert ring.find(b"one") is not None
        write(file, web=key("fresh"))
        clock.now += POLL_SECONDS
        assert ring.find(b"one") is None

    def test_the_usage_of_a_key_survives_changes_of_other_keys(self, file: Path) -> None:
        clock = Clock()
        slow = key("slow", texts_per_second=1, burst=10)
        write(file, slow=slow)
        ring = KeyRing({}, file, clock=clock)
        caller = ring.find(b"slow")
        assert caller is not None
        assert caller.take(10, now=0) == 0
        write(file, slow=slow, more=key("more"))
        clock.now += POLL_SECONDS
        reloaded = ring.find(b"slow")
        assert reloaded is not None
        assert reloaded.take(1, now=0) == 1

    def test_a_changed_symbolic_link_is_reloaded(self, file: Path, tmp_path: Path) -> None:
        clock = Clock()
        link = tmp_path / "current"
        link.symlink_to(file)
        ring = KeyRing({}, link, clock=clock)
        write(tmp_path / "next.toml", web=key("fresh"))
        link.unlink()
        os.symlink(tmp_path / "next.toml", link)
        clock.now += POLL_SECONDS
        assert ring.find(b"fresh") is not None

    def test_max_requests_limits_running_requests(self) -> None:
        ring = KeyRing({"two": key("s", max_requests=2)})
        caller = ring.find(b"s")
        assert caller is not None
        assert [caller.begin() for _ in range(3)] == [True, True, False]
        caller.end()
        assert [caller.begin() for _ in range(2)] == [True, False]


def test_one_secret_under_two_names_is_refused() -> None:
    with pytest.raises(KeysError, match="same key"):
        check_keys({"a": key("x"), "b": key("x")})


class TestAccess:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_no_keys_are_required_on_loopback(self, host: str) -> None:
        settings = Settings(host=host)
        settings.check_access()
        assert settings.anonymous

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "192.0.2.1"])
    def test_other_hosts_require_keys_or_allow_anonymous(self, host: str, file: Path) -> None:
        with pytest.raises(SettingsError, match="allow-anonymous"):
            Settings(host=host).check_access()
        with pytest.raises(SettingsError):
            Settings.model_validate({"host": host, "admin_key": "secret"}).check_access()
        Settings(host=host, allow_anonymous=True).check_access()
        Settings(host=host, keys_file=file).check_access()
        Settings(host=host, keys={"web": key("one")}).check_access()

    def test_an_empty_key_file_allows_no_caller(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.toml"
        path.write_text("")
        assert not Settings(keys_file=path).anonymous

    def test_serve_without_keys_is_one_line(self, command: CommandLine) -> None:
        line = command("serve", "--host=0.0.0.0", "--port=0").complaint(2)
        assert "0.0.0.0" in line
        assert "--allow-anonymous" in line

    def test_an_empty_host_is_refused(self, command: CommandLine) -> None:
        assert "host" in command("serve", "--host=", "--port=0").complaint(2)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--trusted-proxies", "everyone"),
            ("--trusted-proxies", "10.0.0.1/8"),
            ("--cors-origins", "example.org"),
            ("--cors-origins", "https://example.org/path"),
            ("--metrics-port", "8000"),
            ("--tls-cert", "cert.pem"),
            ("--tls-client-ca", "ca.pem"),
            ("--max-header-bytes", "0"),
            ("--receive-seconds", "0"),
            ("--keys", "web={}"),
        ],
    )
    def test_invalid_access_settings_are_one_line(
        self, command: CommandLine, option: str, value: str
    ) -> None:
        command("serve", "--print-config", option, value).complaint(2)
