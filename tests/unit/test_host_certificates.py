"""Certificates handed from one machine to another."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.sottovoce.stack.plugins.lookup import local_certificates
from ansible_collections.sottovoce.stack.plugins.module_utils import _ca_certificates as ca


def pem(body: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"


def test_names_are_kept_apart() -> None:
    files = ca.wanted_files({"a/company.crt": pem("A"), "b/company.crt": pem("B"), "c d.crt": pem("C")})
    assert sorted(files) == ["c_d.crt", "company-2.crt", "company.crt"]


@pytest.mark.parametrize("text", ["", "binary", "-----BEGIN CERTIFICATE-----\nA\n"])
def test_what_is_no_certificate_is_refused_by_name(text: str) -> None:
    with pytest.raises(ca.CertificateError, match=r"odd\.crt"):
        ca.wanted_files({"odd.crt": text})


def test_a_private_key_is_not_handed_on() -> None:
    with pytest.raises(ca.CertificateError, match="private key"):
        ca.wanted_files({"x.crt": pem("A") + "-----BEGIN PRIVATE KEY-----\nk\n-----END PRIVATE KEY-----\n"})


def test_nothing_to_do_when_files_and_bundle_agree() -> None:
    files = {"a.crt": pem("AB\nCD")}
    assert not ca.plan(files, dict(files), pem("X") + pem("ABCD")).changed


def test_a_bundle_made_before_the_files_is_stale() -> None:
    files = {"a.crt": pem("A")}
    plan = ca.plan(files, dict(files), pem("X"))
    assert plan.stale
    assert plan.changed


def test_what_is_dropped_goes() -> None:
    plan = ca.plan({}, {"old.crt": pem("A")}, pem("A"))
    assert plan.remove == ["old.crt"]


def test_a_changed_certificate_is_written() -> None:
    plan = ca.plan({"a.crt": pem("B")}, {"a.crt": pem("A")}, pem("A") + pem("B"))
    assert list(plan.write) == ["a.crt"]


def test_lookup_reads_folders_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.crt").write_text(pem("A"), encoding="utf-8")
    (tmp_path / "sub/b.crt").write_text(pem("B"), encoding="utf-8")
    (tmp_path / "note.txt").write_text("no", encoding="utf-8")
    assert list(local_certificates.read_folder(str(tmp_path))) == ["a.crt", "sub/b.crt"]
    assert local_certificates.read_folder(str(tmp_path / "none")) == {}
    assert local_certificates.read_folder("") == {}
