"""Apply against a remote server over TLS: a client certificate, and a pinned certificate of the server."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e import OCTET, Collection

INFRA = f"""---
project_name: remote
global:
  addressing: {{base_octet: 10, zone_base: {OCTET + 2 - 20}}}
domains:
  remote:
    ephemeral: true
    machines:
      r1: {{roles: [base_system]}}
"""


def incus(*arguments: str) -> str:
    return subprocess.run(
        ["incus", *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Path]:
    """An inventory whose server is this run's daemon, reached over TLS on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=e2e", "-keyout", "client.key", "-out", "client.crt"),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    incus("config", "set", "core.https_address", address)
    incus("config", "trust", "add-certificate", str(tmp_path / "client.crt"), "--name", "e2e")
    fingerprint = json.loads(incus("query", "/1.0"))["environment"]["certificate_fingerprint"]
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars/all.yml").write_text(
        f"ansible_incus_url: https://{address}\n"
        f"ansible_incus_client_cert: {tmp_path}/client.crt\n"
        f"ansible_incus_client_key: {tmp_path}/client.key\n"
        f"ansible_incus_server_cert: {fingerprint}\n",
        encoding="utf-8",
    )
    (tmp_path / "infra.yml").write_text(INFRA, encoding="utf-8")
    yield tmp_path
    incus("config", "unset", "core.https_address")
    incus(
        "config", "trust", "remove", incus("config", "trust", "list", "--format=csv", "--columns=f").strip()
    )


def test_apply_status_and_destroy_over_tls(remote: Path, collection: Collection) -> None:
    # Without the socket's path: whatever works, works over TLS.
    nowhere = {"INCUS_DIR": "/nonexistent", "INCUS_SOCKET": "/nonexistent/unix.socket"}
    inventory = remote / "infra.yml"
    first = collection.play("apply", inventory, "--tags", "infra,base", environment=nowhere)
    assert first.recap["r1"]["changed"] > 0
    assert collection.play("apply", inventory, "--tags", "infra,base", environment=nowhere).changed == 0
    assert "running" in collection.play("status", inventory, environment=nowhere).output
    collection.play("destroy", inventory, "-e", "confirm=yes", environment=nowhere)
    assert "remote" not in incus("project", "list", "--format=csv")
