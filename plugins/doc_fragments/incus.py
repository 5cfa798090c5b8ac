# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How modules of this collection reach an Incus daemon."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  socket:
    description:
      - Path of the daemon's unix socket.
      - Without it, E(INCUS_SOCKET), then V(unix.socket) in E(INCUS_DIR), then
        V(/var/lib/incus/unix.socket) or V(/run/incus/unix.socket) is taken, as the C(incus) command does.
    type: path
  remote_url:
    description:
      - Address of a remote server, such as V(https://gpu-host:8443). Then O(socket) is not used.
    type: str
  client_cert:
    description:
      - Client certificate (PEM file) that the remote server trusts.
      - Without it, V(client.crt) and V(client.key) in E(INCUS_CONF) or V(~/.config/incus) are taken if
        they exist.
    type: path
  client_key:
    description:
      - Key (PEM file) of O(client_cert).
    type: path
  server_cert:
    description:
      - The remote server's certificate, as a PEM file or as its SHA-256 fingerprint; no other is accepted.
      - Without it, the certificate must be valid for the system's certificate authorities.
    type: str
  timeout:
    description:
      - Seconds that one answer of the daemon may take.
    type: int
    default: 30
"""
