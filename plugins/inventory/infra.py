# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: infra
short_description: Hosts, groups and the desired state of Incus from infra.yml
version_added: 0.1.0
author:
  - The sottovoce.stack contributors (@sottovoce)
description:
  - Reads C(infra.yml), which declares domains and the machines in them, and gives Ansible a host for every
    machine, a group for every domain and every role, and the group C(instances) with all machines.
  - Takes files named C(infra.yml), C(infra.yaml), C(*.infra.yml) and C(*.infra.yaml), the folder form
    (C(base.yml) with C(domains/*.yml) and C(policies.yml)), and a YAML file of any name with O(plugin).
  - A folder given with C(-i) may hold C(infra.yml), C(host_vars), C(group_vars) and C(roles).
  - What is set in C(host_vars) and C(group_vars) beside the file wins over what this plugin sets.
  - The group C(all) gets RV(ignore:sottovoce_state), the desired state that
    M(sottovoce.stack.incus_infra) applies, and RV(ignore:sottovoce_notes), what was read and not acted upon.
  - A file with errors ends the run with all of them and exit code 4. Ansible itself would go on with an empty
    inventory, or hand the file to its YAML plugin, which takes the levels of the file for groups.
options:
  plugin:
    description: Marks a file of any name as one for this plugin.
    type: str
    choices: [sottovoce.stack.infra]
notes:
  - Enable it with C(enable_plugins = sottovoce.stack.infra, host_list, script, auto, yaml, ini, toml) in the
    section C([inventory]) of C(ansible.cfg). A file with the key O(plugin) needs no such line.
  - All keys of the file are described in C(docs/infra-yml.md).
"""

EXAMPLES = r"""
# infra.yml
project_name: home
global:
  addressing: {base_octet: 10, zone_base: 100, zone_step: 10}
  default_os_image: images:debian/13
domains:
  ai-tools:
    description: Local LLM and speech
    trust_level: semi-trusted
    machines:
      gpu-server:
        description: Ollama and speech-to-text
        gpu: true
        roles: [base_system, ollama_server, stt_server]
      webui:
        roles: [base_system, open_webui]
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleError, AnsibleParserError
from ansible.inventory.group import Group
from ansible.inventory.host import Host
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.plugins.loader import connection_loader
from ansible.utils.display import Display
from ansible.vars.plugins import get_vars_from_inventory_sources
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import (
    Model,
    load,
    remember,
    without_collector,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_parse import classify, main_of
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError

try:
    from ansible.template import trust_as_template
except ImportError:  # before ansible-core 2.19 every inventory variable is a template

    def trust_as_template(value: Any) -> Any:
        return value


CONNECTION = "sottovoce.stack.incus"
PARSER_ERROR = 4  # what ansible-playbook exits with when it cannot parse something
# Looked up when a play asks for it: as a value it would be part of every host's variables.
STATE = "{{ lookup('sottovoce.stack.infra_state', sottovoce_infra_file) }}"

display = Display()


def trusted(value: Any) -> Any:
    """The same data with its strings usable as templates, as in any inventory a user writes."""
    if isinstance(value, str):
        return trust_as_template(value)
    if isinstance(value, Mapping):
        return {key: trusted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [trusted(item) for item in value]
    return value


@lru_cache(maxsize=4096)
def _plain_text(text: str) -> Any:
    # Only what looks like a template stays untrusted: trust makes no difference to the rest, but
    # ansible-inventory --list wraps every untrusted string.
    return text if "{" in text else trust_as_template(text)


def plain(value: Any) -> Any:
    """What the plugin computed, descriptions included, as data that is never a template."""
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def quiet_group(name: str) -> Any:
    """A group with a '-' in its name. Ansible allows it and warns; a domain is named as Incus wants it."""
    group = Group("domain")
    group.name = name
    return group


class InventoryModule(BaseInventoryPlugin):  # type: ignore[misc]
    NAME = "sottovoce.stack.infra"

    def verify_file(self, path: str) -> bool:
        return bool(super().verify_file(path)) and classify(path) is not None

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        path = os.path.abspath(path)
        try:
            if classify(path) == "member":
                self.check_member(path)
            else:
                self.load(path)
                # Loaded here, the forks of every task have it; else each of them compiles it anew (40 ms).
                connection_loader.get(CONNECTION, class_only=True)
        except AnsibleError as error:
            # An exception would not end the run: Ansible tries its other plugins, and its YAML plugin takes
            # infra.yml for an inventory with the groups "global" and "domains".
            display.error(str(error), wrap_text=False)
            raise SystemExit(PARSER_ERROR) from None

    def check_member(self, path: str) -> None:
        """Part of a document that Ansible, walking a folder, has met before; on its own it means nothing."""
        main = main_of(path)
        if main is None:
            return
        loaded = self.inventory.groups["all"].vars.get("sottovoce_infra_file")
        if loaded is None or os.path.realpath(loaded) != os.path.realpath(main):
            raise AnsibleParserError(
                f"{path}: is one part of a document; give its folder ({os.path.dirname(main)}/) with -i"
            )

    def load(self, path: str) -> None:
        """Everything or nothing: the inventory is touched only once the document is known to be right."""
        before = self.inventory.groups["all"].vars.get("sottovoce_infra_file")
        if before is not None and os.path.realpath(before) != os.path.realpath(path):
            raise AnsibleParserError(
                f"{path}: an inventory holds one infra.yml, and {before} is already loaded; give one with -i"
            )
        try:
            model = load(path, read=self.read, user_vars=self.user_vars(path))
        except InfraError as error:
            raise AnsibleParserError(str(error)) from None
        overridden = {name: self.group_files(path, name) for name in ("all", *model.groups)}
        with without_collector():
            self.fill(model, overridden)
        remember(model.source, model)

    def read(self, path: str) -> bytes:
        # Decrypts a vaulted file as Ansible does for every other file it reads.
        with open(self.loader.get_real_file(path, decrypt=True), "rb") as stream:
            return stream.read()

    def sources(self, path: str) -> list[str]:
        return [path, *getattr(self.inventory, "processed_sources", [])]

    def files_of(self, path: str, entity: Any, what: str) -> Mapping[str, Any]:
        """What the user's group_vars or host_vars say of a group or a host."""
        try:
            found: Mapping[str, Any] = get_vars_from_inventory_sources(
                self.loader, self.sources(path), [entity], "all"
            )
        except AnsibleError as error:  # Ansible does not always say which file it was
            raise AnsibleParserError(f"{os.path.dirname(path)}/{what}/{entity.name}: {error}") from error
        return found

    def group_files(self, path: str, name: str) -> Mapping[str, Any]:
        return self.files_of(path, quiet_group(name), "group_vars")

    def user_vars(self, path: str) -> Any:
        def find(machine: str, groups: tuple[str, ...]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name in ("all", *groups):
                found.update(self.group_files(path, name))
            found.update(self.files_of(path, Host(machine), "host_vars"))
            return found

        return find

    def add_group(self, name: str) -> str:
        if "-" in name and C.TRANSFORM_INVALID_GROUP_CHARS == "never":
            self.inventory.groups.setdefault(name, quiet_group(name))
            return name
        return str(self.inventory.add_group(name))

    def fill(self, model: Model, overridden: Mapping[str, Mapping[str, Any]]) -> None:
        inventory = self.inventory
        names = {}
        for name, group in model.groups.items():
            names[name] = self.add_group(name)
            for key, value in group.vars.items():
                inventory.set_variable(names[name], key, plain(value))
        for key, value in model.all_vars.items():
            inventory.set_variable("all", key, plain(value))
        inventory.set_variable("all", "sottovoce_state", trust_as_template(STATE))
        add_host, add_child, get_host = inventory.add_host, inventory.add_child, inventory.get_host
        for name, host in model.hosts.items():
            add_host(name)
            for group_name in host.groups:
                add_child(names[group_name], name)
            # Host variables rank above group_vars: what the user's group_vars set must not be hidden by ours.
            hidden = {key for group_name in ("all", *host.groups) for key in overridden[group_name]}
            ours = {k: v for k, v in host.vars.items() if k not in hidden} if hidden else host.vars
            get_host(name).vars.update(plain(ours))
            for key, template in host.templates.items():
                if key not in hidden:
                    inventory.set_variable(name, key, trust_as_template(template))
            for key, value in host.user_vars.items():
                inventory.set_variable(name, key, trusted(value))
