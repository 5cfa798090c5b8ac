#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: incus_image_build
short_description: Build a container image where no image server can be reached
version_added: 0.1.0
description:
  - Builds a bootable Debian (or Ubuntu) container image from the distribution's own archive with
    C(mmdebstrap), and imports it into Incus under an alias.
  - Does so only when it is needed, that is, when a container is to be created whose image is no local
    alias, and the image server does not answer. A reachable image server is always preferred.
  - The recipe has a digest, recorded in the image. An image of the same recipe that is younger than
    O(max_age) is left alone. Built files are cached on the host, so another daemon there imports them.
  - Where the host is of the release to be built, its own archive entries for that release, its updates
    and its security suite (and nothing else) become those of the image; else mmdebstrap's defaults.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  alias:
    description: Alias of the image in Incus' default project.
    type: str
    default: sottovoce/debian/12
  distribution:
    description: Name of the distribution, recorded in the image.
    type: str
    default: debian
  release:
    description: Code name of the release to be built.
    type: str
    default: bookworm
  components:
    description: Components of the archive.
    type: list
    elements: str
    default: [main]
  architecture:
    description: Architecture as dpkg names it; empty means that of the host.
    type: str
    default: ""
  packages:
    description:
      - Packages in the image beside the essential ones.
      - C(systemd-sysv), C(udev), C(dbus), C(systemd-resolved) (or its equivalent) and C(python3) must be
        among them, or containers cannot be managed.
    type: list
    elements: str
    required: true
  needed_by:
    description:
      - The containers that may have to be created, as RV(ignore:sottovoce_state.instances) lists them
        (C(project), C(name), C(type), C(image)). If all exist, or their images are local, nothing is done.
      - Without this option the image is taken as needed.
    type: list
    elements: dict
  image_server:
    description: Image server asked (for at most five seconds) before anything is built; empty asks none.
    type: str
    default: https://images.linuxcontainers.org
  max_age:
    description:
      - Days after which an image is built anew when it is needed, so that new containers start with
        current security updates. V(0) means never. Existing containers are not touched.
    type: float
    default: 30
  force:
    description: Build even if the image or the cached files are current.
    type: bool
    default: false
  cache_path:
    description: Folder for the built files; empty means C($XDG_CACHE_HOME/sottovoce/images).
    type: path
    default: ""
  build_timeout:
    description: Seconds the build may take.
    type: int
    default: 900
extends_documentation_fragment:
  - sottovoce.stack.incus
attributes:
  check_mode:
    support: full
    description: Says whether an image would be built or imported.
  diff_mode:
    support: full
    description: Shows the image the alias pointed at and the one it points at afterwards.
"""

EXAMPLES = r"""
- name: Have an image for the containers that are to be created
  sottovoce.stack.incus_image_build:
    packages: [systemd-sysv, udev, dbus, systemd-resolved, libnss-resolve, iproute2, python3, ca-certificates]
    needed_by: "{{ sottovoce_state.instances }}"

- name: Build an image in any case
  sottovoce.stack.incus_image_build:
    alias: mine/debian/13
    release: trixie
    packages: [systemd-sysv, udev, dbus, systemd-resolved, libnss-resolve, iproute2, python3]
    image_server: ""
"""

RETURN = r"""
needed:
  description: Whether the image is the one that containers are created from.
  returned: success
  type: bool
reason:
  description: Why it was (or would be) built or imported, or why not.
  returned: success
  type: str
would_change:
  description: Whether an image is (or in check mode, would be) built or imported.
  returned: success
  type: bool
tools_missing:
  description: Programs needed for a build that are not installed.
  returned: success
  type: list
  elements: str
socket:
  description: The socket that was used; empty for a remote server.
  returned: success
  type: str
image:
  description: The alias if the image is there (or would be), else empty.
  returned: success
  type: str
fingerprint:
  description: Fingerprint of the image.
  returned: when it is there
  type: str
from_cache:
  description: Whether cached files were imported.
  returned: when something was imported
  type: bool
seconds:
  description: How long the build and the import took.
  returned: when something was imported
  type: float
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _image_build as image_build
from ansible_collections.sottovoce.stack.plugins.module_utils._incus_client import (
    CONNECTION_SPEC,
    Endpoint,
    IncusClient,
    IncusError,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **CONNECTION_SPEC,
            **image_build.LOOK_SPEC,
            "force": {"type": "bool", "default": False},
            "cache_path": {"type": "path", "default": ""},
            "build_timeout": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        with IncusClient(Endpoint.from_params(params), timeout=params["timeout"]) as client:
            run(module, client)
    except (IncusError, image_build.BuildError, OSError) as error:
        module.fail_json(msg=str(error))


def run(module: AnsibleModule, client: IncusClient) -> None:
    params = module.params
    alias = params["alias"]
    look = image_build.look(client, params, force=params["force"])
    result, recipe = look.result, look.recipe
    if recipe is None:
        module.exit_json(**result)
        return
    after = {"alias": alias, image_build.RECIPE_PROPERTY: recipe.digest}
    result.update(changed=True, image=alias, diff={"before": look.before, "after": after})
    if module.check_mode:
        module.exit_json(**result)

    started = time.monotonic()
    folder = params["cache_path"] or None
    try:
        built = image_build.obtain(
            recipe,
            alias,
            folder=folder,
            max_age=params["max_age"],
            force=params["force"],
            build=lambda what, path: image_build.build_rootfs(what, path, timeout=params["build_timeout"]),
        )
    except image_build.BuildError as error:
        if not look.target:
            raise
        module.warn(f"{alias} was not refreshed ({result['reason']}): {error}")
        module.exit_json(
            **{**result, "changed": False, "diff": {}, "reason": "the image could not be refreshed"}
        )
    fingerprint = image_build.import_image(client, built, alias)
    after[image_build.BUILT_PROPERTY] = str(built.built)
    module.exit_json(
        **{
            **result,
            # The files of the cache may be those that are imported already.
            "changed": fingerprint != look.target,
            "fingerprint": fingerprint,
            "from_cache": built.from_cache,
            "seconds": round(time.monotonic() - started, 1),
        }
    )


if __name__ == "__main__":
    main()
