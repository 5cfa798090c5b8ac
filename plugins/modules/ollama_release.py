#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ollama_release
short_description: Finds the Ollama release that a target lacks
version_added: 0.1.0
description:
  - Looks at the target; if the release asked for is not installed there, finds it on the controller.
  - The sources are, in this order, a local archive, the release archive, and the Go module, which is built.
  - Each is checked against a pinned checksum, and kept in a cache of the controller.
  - Does not install; the role P(sottovoce.stack.ollama_server#role) does that with what this returns.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  version:
    description: Version of Ollama.
    type: str
    required: true
  source:
    description: Source to use; V(auto) takes the first that works.
    type: str
    choices: [auto, archive, release, go]
    default: auto
  archive:
    description: Path of a release archive on the controller.
    type: str
    default: ""
  archive_sha256:
    description: SHA-256 of the archive, when it is not the one in O(pins).
    type: str
    default: ""
  release_url:
    description: Folder of the releases, without the version.
    type: str
    required: true
  pins:
    description:
      - Checksums of this version. C(amd64) and C(arm64) are SHA-256 of the release archives.
      - C(go) is the checksum of the Go module as in go.sum.
    type: dict
    default: {}
  go:
    description: Path of the Go toolchain on the controller; empty means the one found.
    type: str
    default: ""
  find:
    description: Whether to find what the target lacks; if not, RV(release) is whatever is installed.
    type: bool
    default: true
  cache_dir:
    description: Cache on the controller; empty means C(sottovoce/ollama) under the user's cache folder.
    type: str
    default: ""
  reach_timeout:
    description: Seconds within which a source must answer.
    type: float
    default: 5
  timeout:
    description: Seconds that a download or a build may take.
    type: float
    default: 3600
attributes:
  check_mode:
    support: full
    description: Can run in check_mode; sources are asked, but nothing is downloaded or built.
  diff_mode:
    support: none
    description: Nothing on the target is changed.
  platform:
    support: full
    platforms: linux
    description: Target OS this module runs on.
notes:
  - Progress of a download or a build is shown while it runs.
"""

EXAMPLES = r"""
- name: Find a release
  sottovoce.stack.ollama_release:
    version: 0.34.4
    release_url: https://github.com/ollama/ollama/releases/download
    pins:
      amd64: c238986e61d40c0cc5f4a9b9e40b9eea104350b77efa34741fc134e105cb9533
  register: found
"""

RETURN = r"""
arch:
  description: Architecture of the target, as Ollama's archives are named.
  returned: success
  type: str
gpu:
  description: Whether device nodes of a GPU are there.
  returned: success
  type: bool
installed:
  description: Name of the release that is installed; empty if none.
  returned: success
  type: str
release:
  description: Name of the release to use; empty if there is none and none was found.
  returned: success
  type: str
install:
  description: Whether RV(release) has to be installed from RV(src).
  returned: success
  type: bool
kind:
  description: Where RV(src) came from.
  returned: when RV(install)
  type: str
src:
  description: File on the controller, an archive or (kind V(go)) the program.
  returned: when RV(install)
  type: str
seconds:
  description: How long finding it took.
  returned: when RV(install)
  type: float
skipped_sources:
  description: Sources that could not be used, with the reason.
  returned: success
  type: list
  elements: dict
"""
