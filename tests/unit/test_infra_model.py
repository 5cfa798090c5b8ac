# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a valid document means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from _infra_support import DATA, HEAD, model_of
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import load, load_text


def test_the_users_file_in_full() -> None:
    model = load(str(DATA / "home.infra.yml"))
    source = str(DATA / "home.infra.yml")
    protected = {"security.protection.delete": "true"}

    def nic(ip: str) -> dict[str, Any]:
        return {"eth0": {"type": "nic", "name": "eth0", "network": "net-ai-tools", "ipv4.address": ip}}

    common = {
        "project": "ai-tools", "type": "container", "image": "images:debian/13", "ephemeral": False,
        "profiles": ["default"], "target": None, "started": True, "config": protected,
    }  # fmt: skip
    assert model.state == {
        "project_name": "home",
        "source": source,
        "gpu_policy": "exclusive",
        "projects": [
            {
                "name": "ai-tools",
                "description": "Local LLM and speech",
                "config": {
                    "features.images": "false",
                    "features.networks": "false",
                    "features.profiles": "true",
                    "features.storage.volumes": "true",
                },
            }
        ],
        "networks": [
            {
                "project": "default",
                "name": "net-ai-tools",
                "type": "bridge",
                "description": "Local LLM and speech",
                "config": {
                    "ipv4.address": "10.120.0.254/24",
                    "ipv4.nat": "true",
                    "ipv4.dhcp.ranges": "10.120.0.100-10.120.0.199",
                    "ipv6.address": "none",
                },
            }
        ],
        "profiles": [],
        "volumes": [],
        "instances": [
            common
            | {
                "name": "gpu-server",
                "description": "Ollama and speech-to-text",
                "devices": nic("10.120.0.1"),
                "gpu": {"optional": False},
            },
            common | {"name": "webui", "description": "", "devices": nic("10.120.0.2"), "gpu": None},
        ],
    }
    assert model.hosts["webui"].vars == {
        "ansible_incus_instance": "webui",
        "instance_name": "webui",
        "instance_type": "lxc",
        "instance_description": "",
        "instance_domain": "ai-tools",
        "instance_ip": "10.120.0.2",
        "instance_os_image": "images:debian/13",
        "instance_gpu": False,
        "instance_roles": ["base_system", "open_webui"],
        "instance_ephemeral": False,
        "open_webui_stt_url": "http://10.120.0.1:8000/v1",
        "open_webui_ollama_url": "http://10.120.0.1:11434",
    }
    assert model.hosts["gpu-server"].vars["instance_gpu"] is True
    assert model.groups["ai-tools"].vars == {
        "domain_name": "ai-tools",
        "domain_description": "Local LLM and speech",
        "domain_ephemeral": False,
        "domain_trust_level": "semi-trusted",
        "incus_project": "ai-tools",
        "incus_network": {"name": "net-ai-tools", "subnet": "10.120.0.0/24", "gateway": "10.120.0.254"},
        "ansible_incus_project": "ai-tools",
        "subnet_id": 0,
    }
    assert model.groups["instances"].vars == {
        "ansible_connection": "sottovoce.stack.incus",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_user": "root",
    }
    assert {name: group.hosts for name, group in model.groups.items()} == {
        "instances": ["gpu-server", "webui"],
        "ai-tools": ["gpu-server", "webui"],
        "base_system": ["gpu-server", "webui"],
        "ollama_server": ["gpu-server"],
        "stt_server": ["gpu-server"],
        "open_webui": ["webui"],
    }
    assert model.notes == []
    assert model.all_vars["sottovoce_infra_file"] == source


def test_every_key() -> None:
    model = load(str(DATA / "every-key.infra.yml"))
    state = {i["name"]: i for i in model.state["instances"]}
    gpu = state["lab-gpu"]
    assert gpu["config"] == {
        "security.protection.delete": "true", "boot.autostart": "true", "boot.autostart.priority": "10",
        "snapshots.schedule": "0 2 * * *", "snapshots.expiry": "24H", "security.nesting": "true",
        "limits.processes": "1000",
    }  # fmt: skip
    assert gpu["devices"] == {
        "eth0": {"type": "nic", "name": "eth0", "network": "lab0", "ipv4.address": "10.70.7.42"},
        "sv-docs": {"type": "disk", "source": "/srv/docs", "path": "/docs", "shift": "true"},
        "pd-notes": {
            "type": "disk", "source": "/srv/data/lab/lab-gpu/notes", "path": "/srv/notes",
            "readonly": "true", "shift": "true",
        },
        "models": {"type": "disk", "source": "models", "path": "/var/lib/ollama", "pool": "fast"},
        "web": {"type": "proxy", "listen": "tcp:127.0.0.1:8080", "connect": "tcp:127.0.0.1:80"},
    }  # fmt: skip
    assert gpu["gpu"] == {"pci": "0000:01:00.0", "optional": True}
    assert (gpu["image"], gpu["target"], gpu["profiles"]) == (
        "images:ubuntu/24.04",
        "@gpu",
        ["default", "small"],
    )
    vm = state["lab-vm"]
    assert vm["type"] == "virtual-machine"
    assert vm["config"] == {"security.protection.delete": "false"}
    assert vm["gpu"] == {"uuid": "GPU-0f3a1b2c-1111-2222-3333-444455556666", "optional": False}
    assert vm["devices"]["sv-docs"]["readonly"] == "true"
    assert vm["devices"]["sv-inbox"]["source"] == "/srv/shares/inbox"
    assert model.state["volumes"] == [
        {"project": "lab", "name": "models", "pool": "fast", "description": "", "config": {"size": "200GiB"}},
        {"project": "lab", "name": "spare", "pool": None, "description": "", "config": {"size": "1GiB"}},
    ]
    assert [p["name"] for p in model.state["profiles"]] == ["small", "scratch"]
    assert model.state["profiles"][0]["config"] == {"limits.cpu": "2", "limits.memory": "1GiB"}
    host = model.hosts["lab-gpu"]
    assert host.user_vars == {
        "stt_server_model": "medium", "greeting": "hello from {{ inventory_hostname }}",
        "list": [1, "two", {"three": 3.5}],
    }  # fmt: skip
    assert host.vars["instance_storage_volumes"]["models"] == {
        "path": "/var/lib/ollama", "size": "200GiB", "pool": "fast",
    }  # fmt: skip
    assert host.vars["instance_boot_priority"] == 10
    assert host.vars["instance_snapshots_expiry"] == "24H"
    assert host.vars["instance_target"] == "@gpu"
    assert host.vars["instance_gpu_request"] == {"pci": "0000:01:00.0", "optional": True}
    assert model.all_vars["network_policies"][0] == {
        "description": "The host looks in", "from": "host", "to": "lab", "ports": [22, 443],
        "protocol": "tcp", "bidirectional": False,
    }  # fmt: skip
    assert model.notes == [
        "domains are not isolated from each other yet; 2 network_policies are checked and not enforced",
        "gpu_policy is shared: lab-gpu, lab-vm use the GPU together, without a limit of VRAM for each",
    ]


def test_the_state_is_plain_json_with_text_for_values() -> None:
    for name in ("home.infra.yml", "every-key.infra.yml", "legacy.infra.yml", "anklume/infra.yml", "folder"):
        state = load(str(DATA / name)).state
        assert json.loads(json.dumps(state)) == state
        for kind in ("projects", "networks", "profiles", "volumes", "instances"):
            for item in state[kind]:
                assert all(isinstance(v, str) for v in item["config"].values())
                for device in item.get("devices", {}).values():
                    assert all(isinstance(v, str) for v in device.values())


def test_a_file_of_anklume_loads_and_is_told_once_what_is_left_out() -> None:
    model = load(str(DATA / "anklume" / "infra.yml"))
    assert model.hosts["ai-chat"].vars["instance_roles"] == ["base_system", "lobechat"]
    assert len(model.notes) == 3
    ignored, roles, isolation = model.notes
    for key in (
        "global default_connection",
        "global nesting_prefix",
        "global resource_policy",
        "domain file_portal (ai-tools)",
        "domain ai_provider (ai-tools)",
        "machine weight (gpu-server)",
        "machine export_apps (ai-chat)",
    ):
        assert ignored.count(key) == 1
    assert "admin_bootstrap (anklume-instance)" in roles
    assert "lobechat (ai-chat)" in roles
    assert isolation.startswith("domains are not isolated from each other yet; 1 network_policies")
    gpu = next(i for i in model.state["instances"] if i["name"] == "gpu-server")
    assert gpu["gpu"] is None, "the profile's device is the GPU; a second one would double it"
    assert model.hosts["gpu-server"].vars["instance_gpu"] is True


def test_gpu_policy_counts_only_machines_that_exist() -> None:
    model = model_of("""
        domains:
          a: {machines: {m: {gpu: true}}}
          b: {enabled: false, machines: {n: {gpu: true}}}
        """)
    assert list(model.hosts) == ["m"]


def test_count_and_optional() -> None:
    model = model_of("domains: {a: {machines: {m: {gpu: {count: 2, optional: yes}}}}}")
    assert model.state["instances"][0]["gpu"] == {"count": 2, "optional": True}
    assert model_of("domains: {a: {machines: {m: {gpu: false}}}}").state["instances"][0]["gpu"] is None


def test_ephemeral_is_inherited_and_means_no_protection() -> None:
    model = model_of("""
        domains:
          a: {ephemeral: true, machines: {m: {}, n: {ephemeral: false}}}
          b: {machines: {o: {}, p: {ephemeral: true}}}
        """)
    protected = {i["name"]: i["config"]["security.protection.delete"] for i in model.state["instances"]}
    assert protected == {"m": "false", "n": "true", "o": "true", "p": "false"}
    assert not any(i["ephemeral"] for i in model.state["instances"])


def test_persistent_and_shared_volumes_of_incus() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              m: {persistent_data: {data: {path: /data, size: 10GiB}}}
              n: {storage_volumes: {cache: {path: /cache, readonly: true}}}
              o: {storage_volumes: {cache: {path: /other}}}
        shared_volumes:
          docs: {consumers: {a: ro, n: rw}}
        """)
    devices = {i["name"]: i["devices"] for i in model.state["instances"]}
    assert devices["m"]["pd-data"] == {"type": "disk", "source": "m-data", "path": "/data"}
    assert devices["n"]["cache"] == {"type": "disk", "source": "cache", "path": "/cache", "readonly": "true"}
    assert devices["o"]["cache"] == {"type": "disk", "source": "cache", "path": "/other"}
    assert devices["m"]["sv-docs"] == {
        "type": "disk", "source": "sv-docs", "path": "/shared/docs", "readonly": "true",
    }  # fmt: skip
    assert "readonly" not in devices["n"]["sv-docs"]
    assert [(v["project"], v["name"], v["pool"], v["config"]) for v in model.state["volumes"]] == [
        ("a", "sv-docs", None, {"security.shifted": "true"}),
        ("a", "m-data", None, {"size": "10GiB"}),
        ("a", "cache", None, {}),
    ]


def test_the_users_devices_and_config_win() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              m:
                boot_autostart: true
                config: {boot.autostart: false}
                devices:
                  eth0: {type: nic, nictype: bridged, parent: br0}
                  root: {type: disk, path: /, pool: big, size: 20GiB}
        """)
    instance = model.state["instances"][0]
    assert instance["config"]["boot.autostart"] == "false"
    assert instance["devices"]["eth0"] == {"type": "nic", "nictype": "bridged", "parent": "br0"}
    assert instance["devices"]["root"]["pool"] == "big"


WIRED = """
    domains:
      a:
        machines:
          gpu: {{roles: [stt_server, ollama_server]{gpu}}}
          web: {{roles: [open_webui]{web}}}
    """


def wires(model: Any, host: str = "web") -> dict[str, str]:
    return {k: v for k, v in model.hosts[host].vars.items() if k.startswith("open_webui_")}


def test_wiring_per_machine_domain_and_document() -> None:
    assert len(wires(model_of(WIRED.format(gpu="", web="")))) == 2
    assert wires(model_of(WIRED.format(gpu="", web=", wiring: false"))) == {}
    assert (
        wires(model_of(WIRED.format(gpu="", web="").replace("machines:", "wiring: false\n        machines:")))
        == {}
    )
    head = "project_name: p\nglobal: {wiring: false}\n"
    assert wires(model_of(WIRED.format(gpu="", web=""), head)) == {}
    assert len(wires(model_of(WIRED.format(gpu="", web=", wiring: true"), head))) == 2


def test_wiring_follows_the_ports_a_user_set() -> None:
    model = model_of(
        WIRED.format(gpu=", vars: {stt_server_port: 9000, ollama_host: '0.0.0.0:11500'}", web="")
    )
    assert wires(model) == {
        "open_webui_stt_url": "http://10.120.0.1:9000/v1",
        "open_webui_ollama_url": "http://10.120.0.1:11500",
    }

    def files(machine: str, groups: tuple[str, ...]) -> Mapping[str, Any]:
        assert (machine, groups) == ("gpu", ("instances", "a", "stt_server", "ollama_server"))
        return {"stt_server_port": "{{ some_port }}", "ollama_host": "127.0.0.1"}

    model = load_text(HEAD + WIRED.format(gpu="", web="").replace("\n    ", "\n").lstrip(), user_vars=files)
    assert wires(model)["open_webui_stt_url"].endswith(":8000/v1")
    assert wires(model)["open_webui_ollama_url"].endswith(":11434")


def test_two_servers_in_a_domain_are_not_guessed_between() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              one: {roles: [stt_server]}
              two: {roles: [stt_server, ollama_server]}
              web: {roles: [open_webui]}
          b: {machines: {other: {roles: [open_webui]}}}
        """)
    assert wires(model) == {"open_webui_ollama_url": "http://10.120.0.2:11434"}
    assert wires(model, "other") == {}
    assert "domain a has 2 machines with stt_server: set open_webui_stt_url yourself" in model.notes


def test_policies_of_a_disabled_domain_are_noted() -> None:
    model = model_of("""
        domains: {a: {}, b: {enabled: false}}
        network_policies: [{from: a, to: b}]
        """)
    assert "network policies that refer to a disabled domain: network_policies[0]" in model.notes


@pytest.mark.parametrize("length", [11, 12])
def test_longest_domain_name(length: int) -> None:
    body = f"domains: {{{'d' * length}: {{}}}}"
    if length == 11:
        assert model_of(body).state["networks"][0]["name"] == "net-" + "d" * 11
    else:
        with pytest.raises(Exception, match="Linux allows 15"):
            model_of(body)


def test_a_bridge_of_ones_own_makes_room_for_a_long_name() -> None:
    model = model_of("domains: {corp-sandbox: {bridge: net-corp-sand, machines: {m: {}}}}")
    assert model.groups["corp-sandbox"].vars["incus_network"]["name"] == "net-corp-sand"
    assert model.state["instances"][0]["devices"]["eth0"]["network"] == "net-corp-sand"
    assert model.state["projects"][0]["name"] == "corp-sandbox"


def test_default_user() -> None:
    model = model_of("domains: {}", "project_name: p\nglobal: {default_user: admin}\n")
    assert model.groups["instances"].vars["ansible_user"] == "admin"
