# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fetch uv with the pip that Python carries for its virtual environments.

Usage: bootstrap.py DESTINATION, with the hashed requirements in $UV_BOOTSTRAP_LOCK.
The destination appears by one rename, so an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

SYSTEM_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PACKAGES = ("ca-certificates", "python3-venv")


def pip_command() -> list[str]:
    """The bundled pip runs from its wheel; making a whole environment for it takes twice as long."""
    try:
        import ensurepip
    except ImportError:
        # Debian keeps it in a package of its own.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(
                ["apt-get", "-qq", *arguments], env=environment, stdout=sys.stderr, check=True, timeout=300
            )
        import ensurepip
    folders = [
        getattr(ensurepip, "_WHEEL_PKG_DIR", None),
        os.path.join(os.path.dirname(ensurepip.__file__), "_bundled"),
        "/usr/share/python-wheels",
    ]
    wheels = [str(wheel) for folder in folders if folder for wheel in pathlib.Path(folder).glob("pip-*.whl")]
    return [sys.executable, f"{wheels[0]}/pip"] if wheels else [sys.executable, "-m", "pip"]


def main() -> int:
    destination = pathlib.Path(sys.argv[1])
    destination.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if os.path.exists(SYSTEM_CERTIFICATES):
        # pip's own list does not know the certificates of a company proxy.
        environment.setdefault("PIP_CERT", SYSTEM_CERTIFICATES)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".new-", dir=destination.parent))
    try:
        lock = scratch / "requirements.lock"
        lock.write_text(os.environ["UV_BOOTSTRAP_LOCK"], encoding="utf-8")
        target = scratch / "uv"
        pip = subprocess.run(
            [
                *pip_command(), "install", "--quiet", "--no-cache-dir", "--no-compile", "--only-binary=:all:",
                "--require-hashes", "--retries=1", "--timeout=10", f"--target={target}",
                f"--requirement={lock}",
            ],
            env=environment,
            check=False,
            timeout=300,
        )  # fmt: skip
        if pip.returncode != 0:
            print(
                "uv could not be installed from the Python package index (pip's message is above). "
                "Check that this machine reaches it, or name a mirror in uv_index_url.",
                file=sys.stderr,
            )
            return 1
        subprocess.run([target / "bin" / "uv", "--version"], check=True, timeout=30)
        target.chmod(0o755)
        shutil.rmtree(destination, ignore_errors=True)
        target.rename(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
