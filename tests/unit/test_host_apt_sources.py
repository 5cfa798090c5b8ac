"""Reading a host's apt sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.module_utils import _apt_sources as apt
from hypothesis import given
from hypothesis import strategies as st

DEB822 = """\
# the mirror of a company
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://other.example/tool
Suites: stable
Components: main
Enabled: no
"""
ONE_LINE = """\
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main # comment
deb-src http://mirror.example/debian bookworm main
# deb http://mirror.example/debian bookworm-backports main
deb http://mirror.example/debian-security bookworm-security main contrib
deb http://tools.example stable main
"""


def test_deb822_keeps_keys_and_skips_what_is_disabled() -> None:
    first, second = apt.parse_deb822(DEB822)
    assert first.uris == ("http://mirror.example/debian",)
    assert first.suites == ("bookworm", "bookworm-updates")
    assert second.signed_by.startswith("\n -----BEGIN PGP")
    assert second.signed_by.count("\n") == 4


def test_one_line_skips_sources_and_comments() -> None:
    found = apt.parse_one_line(ONE_LINE)
    assert [source.suites for source in found] == [("bookworm",), ("bookworm-security",), ("stable",)]
    assert found[0].signed_by == "/k.gpg"
    assert found[1].components == ("main", "contrib")


@pytest.mark.parametrize("parse", [apt.parse_deb822, apt.parse_one_line])
@given(text=st.text(max_size=300))
def test_no_text_breaks_the_parsers(parse, text: str) -> None:  # type: ignore[no-untyped-def]
    for source in parse(text):
        assert source.uris


def test_backports_take_mirror_and_key_of_the_own_entry() -> None:
    assert apt.backports_source(apt.parse_deb822(DEB822), "bookworm") == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def test_backports_keep_an_inlined_key() -> None:
    source = apt.Source(("http://m.example",), ("bookworm",), ("main",), "\n key\n .\n more")
    stanza = apt.backports_source([source], "bookworm") or ""
    assert stanza.endswith("Signed-By:\n key\n .\n more\n")
    assert apt.parse_deb822(stanza)[0].signed_by == source.signed_by


def test_backports_that_are_there_are_not_added_again() -> None:
    there = apt.Source(("http://m.example",), ("bookworm-backports",), ("main",))
    assert apt.backports_source([there], "bookworm") == ""


def test_no_mirror_is_made_up() -> None:
    assert apt.backports_source([], "bookworm") is None


def test_image_gets_release_updates_and_security_only() -> None:
    assert apt.image_sources(apt.parse_deb822(DEB822), "bookworm", ["main"]) == [
        "deb http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian bookworm-updates main",
        "deb http://mirror.example/debian-security bookworm-security main",
    ]


def test_image_of_another_release_gets_nothing_of_the_host() -> None:
    assert apt.image_sources(apt.parse_deb822(DEB822), "trixie", ["main"]) == []


def test_image_without_security_suite_is_refused() -> None:
    assert (
        apt.image_sources(apt.parse_one_line("deb http://m.example/d bookworm main"), "bookworm", ["main"])
        == []
    )


@pytest.mark.parametrize("uri", ["http://user:word@mirror.example/d", "file:/srv/debian", "cdrom:[x]/"])
def test_passwords_and_local_paths_stay_out_of_images(uri: str) -> None:
    sources = [apt.Source((uri,), ("bookworm", "bookworm-security"), ("main",))]
    assert apt.image_sources(sources, "bookworm", ["main"]) == []


def test_reads_all_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example x main\n", encoding="utf-8")
    (tmp_path / "sources.list.d/b.sources").write_text(DEB822, encoding="utf-8")
    (tmp_path / "sources.list.d/a.list").write_text("deb http://b.example y main\n", encoding="utf-8")
    (tmp_path / "sources.list.d/c.list.disabled").write_text(
        "deb http://c.example z main\n", encoding="utf-8"
    )
    found = [source.uris[0] for source in apt.read_sources(str(tmp_path))]
    assert found[:2] == ["http://a.example", "http://b.example"]
    assert len(found) == 4
    assert apt.read_sources(str(tmp_path / "nothing")) == []


def test_os_release() -> None:
    text = 'ID=debian\nVERSION_ID="12"\n# c\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nBROKEN="x\n'
    values = apt.parse_os_release(text)
    assert values["VERSION_ID"] == "12"
    assert values["PRETTY_NAME"] == "Debian GNU/Linux 12 (bookworm)"
