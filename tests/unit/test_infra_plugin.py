# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory plugin as Ansible runs it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from _infra_support import DATA

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENABLED = "sottovoce.stack.infra,host_list,script,auto,yaml,ini,toml"
HOME = (DATA / "home.infra.yml").read_text()
BAD = "project_name: p\nglobal: {}\ndomains: {a: {machines: {m: {rolls: []}}}, b: 3}\n"


def ansible(
    command: str, *args: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Outside the checkout, with an empty ansible.cfg."""
    (cwd / "ansible.cfg").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ANSIBLE_")}
    environment |= {
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
        "ANSIBLE_INVENTORY_ENABLED": ENABLED,
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_NOCOLOR": "true",
        "ANSIBLE_HOME": str(cwd / ".ansible"),
    }
    environment |= env or {}
    return subprocess.run(
        [str(BIN / command), *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def listed(*args: str | Path, cwd: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    result = ansible("ansible-inventory", *args, "--list", cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "stack"
    where.mkdir()
    (where / "infra.yml").write_text(HOME)
    return where


@pytest.fixture
def play(tmp_path: Path) -> Path:
    path = tmp_path / "play.yml"
    path.write_text(
        "- hosts: localhost\n  gather_facts: false\n  tasks:\n"
        "    - ansible.builtin.debug:\n        msg: went on\n"
    )
    return path


def test_hosts_groups_and_variables(folder: Path) -> None:
    found = listed("-i", folder / "infra.yml", cwd=folder)
    assert set(found["all"]["children"]) == {
        "ungrouped", "instances", "ai-tools", "base_system", "ollama_server", "stt_server", "open_webui",
    }  # fmt: skip
    assert found["ai-tools"]["hosts"] == ["gpu-server", "webui"]
    webui = found["_meta"]["hostvars"]["webui"]
    assert webui["instance_ip"] == "10.120.0.2"
    assert webui["open_webui_stt_url"] == "http://10.120.0.1:8000/v1"
    assert webui["open_webui_ollama_url"] == "http://10.120.0.1:11434"
    assert webui["incus_network"] == {
        "name": "net-ai-tools",
        "subnet": "10.120.0.0/24",
        "gateway": "10.120.0.254",
    }
    assert webui["ansible_connection"] == "sottovoce.stack.incus"
    assert webui["ansible_incus_instance"] == "webui"
    assert webui["ansible_incus_project"] == "ai-tools"
    assert webui["sottovoce_infra_file"] == str(folder / "infra.yml")
    assert webui["sottovoce_notes"] == []


@pytest.mark.parametrize("name", ["infra.yaml", "home.infra.yml", "home.infra.yaml"])
def test_names_of_files(folder: Path, name: str) -> None:
    (folder / "infra.yml").rename(folder / name)
    assert "webui" in listed("-i", folder / name, cwd=folder)["_meta"]["hostvars"]
    assert "webui" in listed("-i", folder, cwd=folder)["_meta"]["hostvars"]


def test_a_file_of_any_name_by_its_plugin_key_with_ansibles_own_settings(folder: Path) -> None:
    (folder / "infra.yml").unlink()
    (folder / "mine.yml").write_text("plugin: sottovoce.stack.infra\n" + HOME)
    defaults = {"ANSIBLE_INVENTORY_ENABLED": "host_list,script,auto,yaml,ini,toml"}
    assert "webui" in listed("-i", folder / "mine.yml", cwd=folder, env=defaults)["_meta"]["hostvars"]
    assert "webui" in listed("-i", folder / "mine.yml", cwd=folder)["_meta"]["hostvars"]


def test_what_the_user_sets_beside_the_file_wins(folder: Path) -> None:
    for name in ("host_vars", "group_vars"):
        (folder / name).mkdir()
    (folder / "host_vars/webui.yml").write_text("open_webui_stt_url: http://elsewhere/v1\nfrom_file: host\n")
    (folder / "host_vars/gpu-server.yml").write_text("stt_server_port: 9000\ninstance_description: mine\n")
    (folder / "group_vars/ai-tools.yml").write_text(
        "open_webui_ollama_url: http://other:1\ndomain_trust_level: admin\n"
    )
    (folder / "group_vars/all.yml").write_text("ansible_user: me\ninstance_os_image: images:own\n")
    (folder / "group_vars/open_webui.yml").write_text("instance_type: strange\n")
    for source in (folder, folder / "infra.yml"):
        hosts = listed("-i", source, cwd=folder)["_meta"]["hostvars"]
        webui, gpu = hosts["webui"], hosts["gpu-server"]
        assert webui["from_file"] == "host"
        assert webui["open_webui_stt_url"] == "http://elsewhere/v1"
        assert webui["open_webui_ollama_url"] == "http://other:1"
        assert (webui["domain_trust_level"], webui["ansible_user"]) == ("admin", "me")
        assert (webui["instance_type"], gpu["instance_type"]) == ("strange", "lxc")
        assert gpu["instance_os_image"] == "images:own"
        assert gpu["instance_description"] == "mine"


def test_wiring_follows_a_port_in_host_vars(folder: Path) -> None:
    (folder / "host_vars").mkdir()
    (folder / "host_vars/gpu-server.yml").write_text("stt_server_port: 9000\n")
    hosts = listed("-i", folder, cwd=folder)["_meta"]["hostvars"]
    assert hosts["webui"]["open_webui_stt_url"] == "http://10.120.0.1:9000/v1"


def test_vars_of_a_machine_win_over_group_vars_and_lose_to_host_vars(folder: Path) -> None:
    (folder / "infra.yml").write_text(HOME + "        vars: {one: infra, two: infra}\n")
    for name in ("host_vars", "group_vars"):
        (folder / name).mkdir()
    (folder / "group_vars/all.yml").write_text("one: group\ntwo: group\n")
    (folder / "host_vars/webui.yml").write_text("two: host\n")
    webui = listed("-i", folder, cwd=folder)["_meta"]["hostvars"]["webui"]
    assert (webui["one"], webui["two"]) == ("infra", "host")


@pytest.mark.parametrize("source", ["", "base.yml"])
def test_folder_form_with_roles_beside_it(tmp_path: Path, source: str) -> None:
    where = tmp_path / "parts"
    shutil.copytree(DATA / "folder", where)
    (where / "roles/beside/files").mkdir()
    (where / "roles/beside/files/broken.yml").write_text("not: [an, inventory\n")
    found = listed("-i", where / source if source else f"{where}/", cwd=tmp_path)
    assert set(found["_meta"]["hostvars"]) == {"web-1", "web-2", "db-1"}
    assert found["beside"]["hosts"] == ["web-2"]
    hosts = found["_meta"]["hostvars"]
    assert hosts["web-2"]["instance_roles_own"] == [str(where / "roles/beside")]
    assert "instance_roles_own" not in hosts["web-1"]


def test_other_inventories_in_the_folder_are_read_as_well(folder: Path) -> None:
    (folder / "extra.ini.yml").write_text("all:\n  hosts:\n    printer:\n")
    assert set(listed("-i", folder, cwd=folder)["_meta"]["hostvars"]) == {"printer", "gpu-server", "webui"}


def test_a_part_of_the_folder_form_alone_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "parts"
    shutil.copytree(DATA / "folder", where)
    result = ansible("ansible-inventory", "-i", where / "domains/10-web.yml", "--list", cwd=tmp_path)
    assert result.returncode == 4
    assert "one part of a document" in result.stderr


def test_two_documents_are_refused(folder: Path) -> None:
    (folder / "second.infra.yml").write_text(HOME)
    result = ansible("ansible-inventory", "-i", folder, "--list", cwd=folder)
    assert result.returncode == 4
    assert "an inventory holds one infra.yml" in result.stderr


@pytest.mark.parametrize("settings", ["ours", "defaults"])
@pytest.mark.parametrize("command", ["ansible-playbook", "ansible-inventory"])
def test_an_error_stops_the_run_whatever_the_settings(
    folder: Path, play: Path, command: str, settings: str
) -> None:
    """Ansible alone would warn and go on; its YAML plugin would take the file."""
    (folder / "infra.yml").write_text("plugin: sottovoce.stack.infra\n" + BAD)
    env = (
        {"ANSIBLE_INVENTORY_ENABLED": "host_list,script,auto,yaml,ini,toml"} if settings == "defaults" else {}
    )
    args = [play] if command == "ansible-playbook" else ["--list"]
    result = ansible(command, "-i", folder / "infra.yml", *args, cwd=folder, env=env)
    assert result.returncode == 4
    assert result.stdout == ""
    assert "went on" not in result.stdout
    assert result.stderr.count("2 errors, nothing was loaded") == 1
    assert "  1. infra.yml:4: domains.a.machines.m.rolls: unknown key; did you mean 'roles'?" in result.stderr
    assert "  2. infra.yml:4: domains.b: must be a mapping, not the number 3" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "content",
    [b"", b"a: [", b"\xff\xfe", b"[" * 300_000, b"- a\n", b"a: &a [*a]\n", b"a: {{ b }}\n", b"\x00"],
)
def test_no_file_makes_a_traceback(folder: Path, content: bytes) -> None:
    (folder / "infra.yml").write_bytes(content)
    result = ansible("ansible-inventory", "-i", folder, "--list", cwd=folder)
    assert result.returncode == 4
    assert result.stdout == ""
    assert "nothing was loaded" in result.stderr
    assert "Traceback" not in result.stderr


def test_broken_group_vars_stop_the_run_too(folder: Path, play: Path) -> None:
    (folder / "group_vars").mkdir()
    (folder / "group_vars/all.yml").write_text("a: [\n")
    result = ansible("ansible-playbook", "-i", folder, play, cwd=folder)
    assert result.returncode == 4
    assert f"{folder}/group_vars/all: " in result.stderr


def test_state_and_templates_in_a_play(folder: Path, tmp_path: Path) -> None:
    text = HOME.replace("description: Ollama and speech-to-text", 'description: "Literally {{ nothing }}"')
    (folder / "infra.yml").write_text(
        text + '        vars: {greeting: "hello {{ instance_ip }}", deep: [{x: "{{ 1 + 1 }}"}]}\n'
    )
    playbook = tmp_path / "state.yml"
    playbook.write_text("""
- hosts: localhost
  gather_facts: false
  tasks:
    - name: The whole state
      ansible.builtin.copy:
        content: >-
          {{ {'state': sottovoce_state, 'greeting': hostvars.webui.greeting, 'deep': hostvars.webui.deep,
              'described': hostvars['gpu-server'].instance_description,
              'groups': groups['ai-tools']} | to_json }}
        dest: "{{ out }}"
        mode: "0600"
    - name: The same from the lookup
      ansible.builtin.assert:
        that: lookup('sottovoce.stack.infra_state', sottovoce_infra_file) == sottovoce_state
""")
    out = tmp_path / "out.json"
    result = ansible("ansible-playbook", "-i", folder, "-e", f"out={out}", playbook, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = json.loads(out.read_text())
    assert seen["greeting"] == "hello 10.120.0.2"
    assert seen["deep"] == [{"x": 2}] or seen["deep"] == [{"x": "2"}]
    assert seen["described"] == "Literally {{ nothing }}"
    assert seen["groups"] == ["gpu-server", "webui"]
    assert [i["name"] for i in seen["state"]["instances"]] == ["gpu-server", "webui"]
    assert seen["state"]["instances"][0]["description"] == "Literally {{ nothing }}"


def test_wiring_follows_language_and_key_wherever_they_are_set(folder: Path, tmp_path: Path) -> None:
    (folder / "host_vars").mkdir()
    (folder / "host_vars/gpu-server.yml").write_text(
        "secret: s3\nstt_server_api_key: '{{ secret }}'\nstt_server_language: de\n"
    )
    playbook = tmp_path / "wires.yml"
    playbook.write_text("""
- hosts: webui
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.assert:
        that:
          - open_webui_stt_language == language
          - open_webui_stt_api_key == 's3'
""")
    for language, extra in (("de", "other=1"), ("fr", "stt_server_language=fr")):
        expected = f"language={language}"
        result = ansible("ansible-playbook", "-i", folder, "-e", expected, "-e", extra, playbook, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("server", "webui", "url", "model", "key"),
    [
        ("other: 1", "other: 1", "", "KOKORO", ""),
        ("stt_server_tts_model: org/voice", "other: 1", "http://10.120.0.1:8000/v1", "org/voice", "s3"),
        ("stt_server_tts_model: org/voice", "open_webui_tts_url: ''", "", "org/voice", ""),
        ("other: 1", "open_webui_tts_url: http://tts/v1", "http://tts/v1", "KOKORO", ""),
    ],
)
def test_speech_output_is_wired_where_the_server_has_a_model_for_it(
    folder: Path, tmp_path: Path, server: str, webui: str, url: str, model: str, key: str
) -> None:
    (folder / "host_vars").mkdir()
    (folder / "host_vars/gpu-server.yml").write_text(f"{server}\nstt_server_api_key: s3\n")
    (folder / "host_vars/webui.yml").write_text(f"{webui}\n")
    defaults = yaml.safe_load((ROOT / "roles/open_webui/defaults/main.yml").read_text())
    default = defaults["open_webui_tts_model"]
    playbook = tmp_path / "wires.yml"
    playbook.write_text("""
- hosts: webui
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.assert:
        that: [open_webui_tts_url == url, open_webui_tts_model == model, open_webui_tts_api_key == key]
""")
    expected = json.dumps({"url": url, "model": model.replace("KOKORO", default), "key": key})
    result = ansible("ansible-playbook", "-i", folder, "-e", expected, playbook, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_encrypted_document(folder: Path) -> None:
    (folder / "password").write_text("secret\n")
    result = ansible("ansible-vault", "encrypt", "--vault-password-file", "password", "infra.yml", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "HELPER" not in result.stderr
    found = listed("-i", folder / "infra.yml", "--vault-password-file", folder / "password", cwd=folder)
    assert "webui" in found["_meta"]["hostvars"]


def test_ten_thousand_machines(tmp_path: Path) -> None:
    """Five seconds of processor for the whole process; the clock would measure what else runs here."""
    domains = "".join(
        f"  d{d:03}:\n    machines:\n"
        + "".join(
            f"      m{d:03}-{m:02}:\n        description: Machine\n        roles: [base_system]\n"
            "        config: {limits.cpu: 2}\n"
            for m in range(99)
        )
        for d in range(102)
    )
    (tmp_path / "infra.yml").write_text(f"project_name: big\nglobal: {{}}\ndomains:\n{domains}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = ansible("ansible-inventory", "-i", tmp_path / "infra.yml", "--graph", "d101", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "m101-98" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_group_names_follow_the_users_own_setting(folder: Path) -> None:
    env = {"ANSIBLE_TRANSFORM_INVALID_GROUP_CHARS": "silently"}
    assert "ai_tools" in listed("-i", folder, cwd=folder, env=env)


@pytest.mark.parametrize("kind", ["inventory", "lookup"])
def test_documentation(kind: str, tmp_path: Path) -> None:
    name = {"inventory": "infra", "lookup": "infra_state"}[kind]
    result = ansible("ansible-doc", "-t", kind, f"sottovoce.stack.{name}", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[f"sottovoce.stack.{name}"]["doc"]["short_description"]
