# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What infra.yml may not say, and in which words it is refused."""

# ruff: noqa: E501 - a table with one case a line
from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from _infra_support import DATA, HEAD, model_of, problems_of, text_of
from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_schema as schema
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import load, load_text
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_parse import (
    classify,
    looks_like_cdi,
    normal_pci,
    parse_text,
)
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError

# name, document below HEAD, line in the whole file, path, message
REFUSED = [
    ("machine-twice", """
        domains:
          a: {machines: {m: {}}}
          b:
            machines:
              m: {}
        """, 7, "domains.b.machines.m", r"already in domain 'a' \(infra.yml, line 4\)"),
    ("machine-in-disabled", """
        domains:
          a: {enabled: false, machines: {m: {}}}
          b: {machines: {m: {}}}
        """, 5, "domains.b.machines.m", "the disabled domain 'a' keeps its names"),
    ("ip-outside", """
        domains:
          a: {machines: {m: {ip: 10.9.9.9}}}
        """, 4, "domains.a.machines.m.ip", r"10.9.9.9 is outside the subnet of domain 'a', 10.120.0.0/24"),
    ("ip-of-other-domain", """
        domains:
          a: {machines: {m: {ip: 10.120.1.5}}}
          b: {}
        """, 4, "domains.a.machines.m.ip", r"it belongs to domain 'b'"),
    ("ip-of-disabled-domain", """
        domains:
          a: {machines: {m: {ip: 10.120.1.5}}}
          b: {enabled: false}
        """, 4, "domains.a.machines.m.ip", "belongs to the disabled domain 'b'.*stay reserved"),
    ("ip-twice", """
        domains:
          a:
            machines:
              m: {ip: 10.120.0.5}
              n: {ip: 10.120.0.5}
        """, 7, "domains.a.machines.n.ip", "10.120.0.5 is already the address of machine 'm'"),
    ("ip-gateway", "domains: {a: {machines: {m: {ip: 10.120.0.254}}}}", 3,
     "domains.a.machines.m.ip", "is the gateway"),
    ("ip-broadcast", "domains: {a: {machines: {m: {ip: 10.120.0.255}}}}", 3,
     "domains.a.machines.m.ip", "no address for a host"),
    ("ip-malformed", "domains: {a: {machines: {m: {ip: 10.120.0}}}}", 3,
     "domains.a.machines.m.ip", "no IPv4 address"),
    ("two-gpus", """
        domains:
          a: {machines: {m: {gpu: {pci: "01:00.0"}}}}
          b:
            machines:
              n: {gpu: {pci: "0000:01:00.0"}}
        """, 7, "domains.b.machines.n.gpu", r"2 ask for 0000:01:00.0: m, n; .*global.gpu_policy: shared"),
    ("two-all", "domains: {a: {machines: {m: {gpu: {all: true}}, n: {gpu: {all: true}}}}}", 3,
     "domains.a.machines.n.gpu", "2 ask for all: m, n"),
    ("two-slices", "domains: {a: {machines: {m: {gpu: {mig: MIG-Aa}}, n: {gpu: {mig: MIG-aA}}}}}", 3,
     "domains.a.machines.n.gpu", "2 ask for mig-aa: m, n"),
    ("gpu-twice", """
        domains:
          a:
            profiles: {g: {devices: {gpu: {type: gpu}}}}
            machines:
              m: {gpu: {pci: "01:00.0"}, profiles: [g]}
        """, 7, "domains.a.machines.m.gpu", "also gets a GPU by profile g"),
    ("gpu-cdi", "domains: {a: {machines: {m: {gpu: nvidia.com/gpu=0}}}}", 3,
     "domains.a.machines.m.gpu", "CDI name, which Incus does not know; write the card's PCI address"),
    ("gpu-cdi-pci", "domains: {a: {machines: {m: {gpu: {pci: nvidia.com/gpu=0}}}}}", 3,
     "domains.a.machines.m.gpu.pci", "CDI name"),
    ("gpu-cdi-device", "domains: {a: {machines: {m: {devices: {g: {type: gpu, id: nvidia.com/gpu=all}}}}}}", 3,
     "domains.a.machines.m.devices.g.id", "CDI name"),
    ("gpu-two-choices", "domains: {a: {machines: {m: {gpu: {pci: '01:00.0', count: 1}}}}}", 3,
     "domains.a.machines.m.gpu", "by one of pci, uuid, count, all, mig .*not by pci and count"),
    ("gpu-pci", "domains: {a: {machines: {m: {gpu: {pci: first}}}}}", 3,
     "domains.a.machines.m.gpu.pci", "no PCI address"),
    ("gpu-mig", "domains: {a: {machines: {m: {gpu: {uuid: MIG-1}}}}}", 3,
     "domains.a.machines.m.gpu.uuid", "is a MIG slice, not a card; write gpu: .mig: MIG-1"),
    ("gpu-mig-word", "domains: {a: {machines: {m: {gpu: {mig: half}}}}}", 3,
     "domains.a.machines.m.gpu.mig", "neither the UUID of a MIG slice"),
    ("gpu-mig-cdi", "domains: {a: {machines: {m: {gpu: {mig: nvidia.com/mig-1g.5gb=0}}}}}", 3,
     "domains.a.machines.m.gpu.mig", "CDI name"),
    ("gpu-uuid-cdi", "domains: {a: {machines: {m: {gpu: {uuid: nvidia.com/gpu=0}}}}}", 3,
     "domains.a.machines.m.gpu.uuid", "CDI name"),
    ("gpu-word", "domains: {a: {machines: {m: {gpu: nvidia}}}}", 3,
     "domains.a.machines.m.gpu", "must be true, false or a mapping"),
    ("profile", """
        domains:
          a:
            profiles: {small: {}}
            machines: {m: {profiles: [smal]}}
        """, 6, "domains.a.machines.m.profiles", "no profile 'smal' in domain 'a'; did you mean 'small'"),
    ("role", "domains: {a: {machines: {m: {roles: [olama_server]}}}}", 3,
     "domains.a.machines.m.roles[0]", "unknown role 'olama_server'.*did you mean 'ollama_server'"),
    ("role-number", "domains: {a: {machines: {m: {roles: [1]}}}}", 3,
     "domains.a.machines.m.roles[0]", r"must be the name of a role, not the number 1 \(write \"1\" in quotes\)"),
    ("roles-word", "domains: {a: {machines: {m: {roles: base_system}}}}", 3,
     "domains.a.machines.m.roles", "must be a list of role names, not 'base_system'"),
    ("bridge-long", "domains: {corp-sandbox: {}}", 3,
     "domains.corp-sandbox", "'net-corp-sandbox' has 16 characters, Linux allows 15: .* 11 characters.*bridge: net-"),
    ("bridge-explicit-long", "domains: {a: {bridge: a-very-long-bridge}}", 3,
     "domains.a.bridge", "has 18 characters; Linux allows 15"),
    ("bridge-twice", "domains: {a: {}, b: {bridge: net-a}}", 3, "domains.b.bridge", "is the one of domain 'a'"),
    ("domain-name", "domains: {Ai_Tools: {}}", 3, "domains.Ai_Tools", "no name for a domain: lower-case"),
    ("machine-name", "domains: {a: {machines: {gpu_server: {}}}}", 3,
     "domains.a.machines.gpu_server", "no name for a machine"),
    ("machine-number", "domains: {a: {machines: {7: {}}}}", 3, "domains.a.machines.7", "must not be a number"),
    ("machine-long", f"domains: {{a: {{machines: {{{'m' * 64}: {{}}}}}}}}", 3, "", "at most 63 characters"),
    ("machine-is-domain", "domains: {a: {machines: {b: {}}}, b: {}}", 3,
     "domains.a.machines.b", "also a domain; in Ansible it would be a host and a group"),
    ("machine-is-group", "domains: {a: {machines: {instances: {}}}}", 3,
     "domains.a.machines.instances", "meaning of its own"),
    ("machine-localhost", "domains: {a: {machines: {localhost: {}}}}", 3, "domains.a.machines.localhost", "meaning"),
    ("domain-all", "domains: {all: {}}", 3, "domains.all", "meaning of its own"),
    ("domain-default", "domains: {default: {}}", 3, "domains.default", "project Incus keeps for itself"),
    ("unknown-machine-key", "domains: {a: {machines: {m: {rolls: []}}}}", 3,
     "domains.a.machines.m.rolls", "unknown key; did you mean 'roles'"),
    ("unknown-domain-key", "domains: {a: {machine: {}}}", 3, "domains.a.machine", "did you mean 'machines'"),
    ("unknown-top-key", "domain: {}\ndomains: {}", 3, "domain", "did you mean 'domains'"),
    ("unknown-strange-key", "domains: {a: {xyzzy: 1}}", 3, "domains.a.xyzzy", "unknown key; known here: bridge"),
    ("domains-list", "domains: [a]", 3, "domains", "must be a mapping of domains, not a list"),
    ("domain-text", "domains: {a: hello}", 3, "domains.a", "must be a mapping, not 'hello'"),
    ("machine-text", "domains: {a: {machines: {m: hello}}}", 3, "domains.a.machines.m", "must be a mapping"),
    ("type", "domains: {a: {machines: {m: {type: container}}}}", 3,
     "domains.a.machines.m.type", "must be one of lxc, vm, not 'container'"),
    ("trust", "domains: {a: {trust_level: semi-trustd}}", 3, "domains.a.trust_level", "did you mean 'semi-trusted'"),
    ("enabled", "domains: {a: {enabled: 'yes'}}", 3, "domains.a.enabled", "must be true or false, not 'yes'"),
    ("subnet-id-range", "domains: {a: {subnet_id: 255}}", 3, "domains.a.subnet_id", "from 0 to 254"),
    ("subnet-id-bool", "domains: {a: {subnet_id: true}}", 3, "domains.a.subnet_id", "not the boolean true"),
    ("subnet-id-twice", "domains: {a: {subnet_id: 3}, b: {subnet_id: 3}}", 3,
     "domains.b.subnet_id", "subnet_id 3 is that of domain 'a' in zone semi-trusted"),
    ("boot-priority", "domains: {a: {machines: {m: {boot_priority: 101}}}}", 3,
     "domains.a.machines.m.boot_priority", "from 0 to 100"),
    ("schedule", "domains: {a: {machines: {m: {snapshots_schedule: '@dayly'}}}}", 3,
     "domains.a.machines.m.snapshots_schedule", "did you mean '@daily'"),
    ("expiry", "domains: {a: {machines: {m: {snapshots_expiry: soon}}}}", 3,
     "domains.a.machines.m.snapshots_expiry", "a time like 30d"),
    ("config-list", "domains: {a: {machines: {m: {config: {limits.cpu: [1]}}}}}", 3,
     "domains.a.machines.m.config.limits.cpu", "must be text, a number or a boolean, not a list"),
    ("config-null", "domains: {a: {machines: {m: {config: {limits.cpu: }}}}}", 3,
     "domains.a.machines.m.config.limits.cpu", "has no value"),
    ("device-type", "domains: {a: {machines: {m: {devices: {d: {path: /x}}}}}}", 3,
     "domains.a.machines.m.devices.d", "type is missing"),
    ("device-bad-type", "domains: {a: {machines: {m: {devices: {d: {type: dik}}}}}}", 3,
     "domains.a.machines.m.devices.d.type", "did you mean 'disk'"),
    ("volume-path", "domains: {a: {machines: {m: {persistent_data: {d: {}}}}}}", 3,
     "domains.a.machines.m.persistent_data.d", "path is missing"),
    ("volume-relative", "domains: {a: {machines: {m: {storage_volumes: {d: {path: srv}}}}}}", 3,
     "domains.a.machines.m.storage_volumes.d.path", "must be an absolute path, not 'srv'"),
    ("volume-size", "domains: {a: {machines: {m: {storage_volumes: {d: {path: /d, size: big}}}}}}", 3,
     "domains.a.machines.m.storage_volumes.d.size", "must be a size like 10GiB"),
    ("volume-device", """
        domains:
          a:
            machines:
              m:
                devices: {pd-d: {type: none}}
                persistent_data: {d: {path: /d}}
        """, 8, "domains.a.machines.m.persistent_data.d", "has a device 'pd-d' of its own"),
    ("volume-place", """
        domains:
          a:
            machines:
              m:
                storage_volumes: {d: {path: /d}}
                persistent_data: {e: {path: /d/}}
        """, 8, "domains.a.machines.m.persistent_data.e", "/d of machine 'm' is already the place of storage_volumes.d"),
    ("volume-name-clash", """
        domains:
          a:
            machines:
              x: {persistent_data: {y-z: {path: /d}}}
              x-y: {persistent_data: {z: {path: /d}}}
        """, 7, "domains.a.machines.x-y.persistent_data.z", "its volume x-y-z is already one of domain 'a'"),
    ("vars-name", "domains: {a: {machines: {m: {vars: {a-b: 1}}}}}", 3,
     "domains.a.machines.m.vars.a-b", "no name for a variable"),
    ("vars-computed", "domains: {a: {machines: {m: {vars: {instance_ip: 1}}}}}", 3,
     "domains.a.machines.m.vars.instance_ip", "computed from this document"),
    ("vars-nan", "domains: {a: {machines: {m: {vars: {x: [.nan]}}}}}", 3,
     "domains.a.machines.m.vars.x[0]", "JSON"),
    ("policy-missing", "domains: {a: {}}\nnetwork_policies: [{from: a}]", 4, "network_policies[0]", "to is missing"),
    ("policy-unknown", "domains: {web: {}}\nnetwork_policies: [{from: wb, to: host}]", 4,
     "network_policies[0].from", "'wb' is no domain, no machine and not host; did you mean 'web'"),
    ("policy-port", "domains: {a: {}}\nnetwork_policies: [{from: a, to: host, ports: [0]}]", 4,
     "network_policies[0].ports[0]", "from 1 to 65535"),
    ("policy-ports", "domains: {a: {}}\nnetwork_policies: [{from: a, to: host, ports: 80}]", 4,
     "network_policies[0].ports", "a list of port numbers or all"),
    ("shared-nobody", "domains: {a: {}}\nshared_volumes: {v: {path: /v}}", 4, "shared_volumes.v", "consumers is missing"),
    ("shared-unknown", "domains: {web: {}}\nshared_volumes: {v: {consumers: {wbe: ro}}}", 4,
     "shared_volumes.v.consumers.wbe", "no domain and no machine; did you mean 'web'"),
    ("shared-mode", "domains: {a: {}}\nshared_volumes: {v: {consumers: {a: wr}}}", 4,
     "shared_volumes.v.consumers.a", "must be one of ro, rw, not 'wr'"),
    ("shared-two-domains", """
        domains: {a: {machines: {m: {}}}, b: {machines: {n: {}}}}
        shared_volumes: {v: {consumers: {a: ro, b: rw}}}
        """, 4, "shared_volumes.v", r"shared by the domains a, b: .*source: /srv"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "line", "path", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_with_its_own_message(body: str, line: int, path: str, message: str) -> None:
    problems = problems_of(text_of(body))
    assert len(problems) == 1, problems
    problem = problems[0]
    assert (problem.file, problem.line) == ("infra.yml", line)
    if path:
        assert problem.path == path
    assert re.search(message, problem.message), problem.message


WHOLE = [
    ("empty", "", 0, "", "the file is empty"),
    ("comments", "# nothing\n---\n", 0, "", "the file is empty"),
    ("list", "- a\n", 1, "", r"must be a mapping \(key: value\), not a list"),
    ("text", "hello\n", 1, "", "must be a mapping .*not 'hello'"),
    ("no-project", "global: {}\ndomains: {}\n", 1, "project_name", "is missing"),
    ("no-global", "project_name: p\ndomains: {}\n", 1, "global", "is missing"),
    ("no-domains", "project_name: p\nglobal: {}\n", 1, "domains", "is missing"),
    ("duplicate-key", HEAD + "domains:\n  a: {}\n  a: {}\n", 5, "domains.a", r"there twice \(first on line 4\)"),
    ("syntax", HEAD + "domains: {a: {\n", 4, "", "not YAML"),
    ("tab", HEAD + "domains:\n\ta: {}\n", 4, "", "a tab where YAML wants spaces"),
    ("latin1", HEAD.encode() + b"domains: {a: {description: caf\xe9}}\n", 3, "", "not UTF-8 text .*0xe9"),
    ("control", HEAD + 'domains: {a: {description: "a\x07"}}\n', 3, "", r"control character \(U\+0007\)"),
    ("two-documents", HEAD + "domains: {}\n---\nx: 1\n", 4, "", "a second YAML document"),
    ("undefined-alias", HEAD + "domains: *d\n", 3, "", r"\*d refers to no anchor"),
    ("self-alias", HEAD + "domains: &d\n  a: *d\n", 4, "", "refers to the value that contains it"),
    ("tag", HEAD + "domains: {a: {machines: {m: {vars: {x: !vault y}}}}}\n", 3, "", "tag !vault is not supported"),
    ("python-tag", HEAD + "domains: !!python/object/apply:os.system [id]\n", 3, "", "tag !!python"),
    ("complex-key", HEAD + "domains: {[a]: {}}\n", 3, "domains", "a key must be text, not a list"),
    ("bad-merge", HEAD + "domains: {<<: 3}\n", 3, "domains", "'<<' merges mappings"),
    ("plugin", "plugin: other.one\n" + HEAD + "domains: {}\n", 1, "plugin", "must be sottovoce.stack.infra"),
    ("octet", "project_name: p\nglobal: {addressing: {base_octet: 11}}\ndomains: {}\n", 2,
     "global.addressing.base_octet", "must be 10"),
    ("zone-base", "project_name: p\nglobal: {addressing: {zone_base: 246}}\ndomains: {}\n", 2,
     "global.addressing.zone_base", "from 0 to 245"),
    ("zone-over", "project_name: p\nglobal: {addressing: {zone_base: 240}}\ndomains: {a: {}}\n", 3,
     "domains.a", "its zone semi-trusted would be 10.260; lower"),
    ("gpu-policy", "project_name: p\nglobal: {gpu_policy: share}\ndomains: {}\n", 2,
     "global.gpu_policy", "did you mean 'shared'"),
    ("both-addressings", "project_name: p\nglobal: {addressing: {}, base_subnet: '10.1'}\ndomains: {}\n", 2,
     "global.base_subnet", "cannot stand beside global.addressing"),
    ("public-subnet", "project_name: p\nglobal: {base_subnet: '8.8'}\ndomains: {}\n", 2,
     "global.base_subnet", "no private network"),
    ("legacy-subnet-id", "project_name: p\nglobal: {base_subnet: '10.1'}\ndomains: {a: {}}\n", 3,
     "domains.a", "subnet_id is missing"),
    ("live-os", "live_os: {}\ndomains: [{name: a}]\n", 1, "", "live image of AnKLuMe"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "path", "message"), [w[1:] for w in WHOLE], ids=[w[0] for w in WHOLE]
)
def test_whole_files(text: str | bytes, line: int, path: str, message: str) -> None:
    problems = problems_of(text)
    assert len(problems) == 1, problems
    assert (problems[0].line, problems[0].path) == (line, path)
    assert re.search(message, problems[0].message), problems[0].message


def test_all_errors_at_once_numbered_in_the_order_of_lines() -> None:
    text = text_of("""
        domains:
          a:
            trustlevel: x
            machines:
              m: {gpu: maybe, ip: 1}
          b: 3
        """)
    with pytest.raises(InfraError) as caught:
        load_text(text)
    lines = str(caught.value).split("\n")
    assert lines[0] == "infra.yml: 4 errors, nothing was loaded"
    assert [line.split(". ")[0].strip() for line in lines[1:]] == ["1", "2", "3", "4"]
    assert lines[1].endswith("infra.yml:5: domains.a.trustlevel: unknown key; did you mean 'trust_level'?")
    assert [p.line for p in caught.value.problems] == [5, 7, 7, 8]


def test_a_broken_domain_does_not_break_what_refers_to_it() -> None:
    problems = problems_of(
        text_of("""
        domains:
          a: {machines: {m: 3}}
          b: 4
        network_policies: [{from: a, to: m}, {from: b, to: host}]
        shared_volumes: {v: {source: /v, consumers: {b: ro, m: rw}}}
        """)
    )
    assert [p.path for p in problems] == ["domains.a.machines.m", "domains.b"]


def test_more_than_99_machines() -> None:
    machines = ", ".join(f"m{i}: {{}}" for i in range(100))
    problems = problems_of(f"{HEAD}domains: {{a: {{machines: {{{machines}}}}}}}\n")
    assert len(problems) == 1
    assert (
        "100 machines are more than the 99 addresses of a domain (10.120.0.1 to 10.120.0.99)"
        in problems[0].message
    )
    assert len(model_of(f"domains: {{a: {{machines: {{{machines.rsplit(', ', 1)[0]}}}}}}}").hosts) == 99


def test_aliases_that_expand_without_end_are_refused_fast() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    start = time.monotonic()
    problems = problems_of("\n".join(lines))
    assert time.monotonic() - start < 2
    assert re.search(r"aliases expand to [\d,]+ values", problems[0].message)


@pytest.mark.parametrize("text", ["[" * 300_000, "- " * 300_000 + "x", "{a: " * 100_000, "&a [" * 50_000])
def test_deep_nesting_is_refused(text: str) -> None:
    """The composer of the C library dies of these."""
    assert any("nested deeper than" in p.message for p in problems_of(text))


def test_a_long_chain_of_merges_does_not_exhaust_the_stack() -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: *a{i - 1}}}" for i in range(1, 3000)]
    assert problems_of("\n".join(lines))


def test_anchors_and_merge_keys() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              m: &base {description: one, roles: [base_system]}
              n: {<<: *base, description: two}
        """)
    assert model.hosts["n"].vars["instance_description"] == "two"
    assert model.hosts["n"].vars["instance_roles"] == ["base_system"]


def test_empty_values_count_as_not_given() -> None:
    model = model_of("""
        domains:
          a:
            description:
            profiles:
            machines:
              m:
              n: {roles: , gpu: , ip: , config: }
        network_policies:
        shared_volumes:
        """)
    assert list(model.hosts) == ["m", "n"]


def test_roles_beside_the_file_are_known_and_win_over_anklumes() -> None:
    body = "domains: {a: {machines: {m: {roles: [mine, lobechat]}}}}"
    model = model_of(body, roles=("mine", "lobechat"))
    assert model.hosts["m"].groups == ("instances", "a", "mine", "lobechat")
    assert model.notes == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0000:01:00.0", "0000:01:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("00000000:0A:1F.1", "0000:0a:1f.1"),
        ("0001:c1:00.0", "0001:c1:00.0"),
        ("1:0.0", None),
        ("0000:01:00", None),
        ("", None),
    ],
)
def test_pci_addresses_are_normalised(text: str, expected: str | None) -> None:
    assert normal_pci(text) == expected


def test_an_unquoted_pci_address_is_no_sexagesimal_number() -> None:
    model = model_of("domains: {a: {machines: {m: {gpu: {pci: 01:00.0}}}}}")
    assert model.state["instances"][0]["gpu"] == {"pci": "0000:01:00.0", "optional": False}


@pytest.mark.parametrize(
    "text", ["nvidia.com/gpu=0", "nvidia.com/gpu:0", "nvidia.com/gpu", "amd.com/gpu=all"]
)
def test_cdi_names_are_recognised(text: str) -> None:
    assert looks_like_cdi(text)
    assert not looks_like_cdi("0000:01:00.0")


@pytest.mark.parametrize(
    ("given", "incus"), [("30d", "30d"), ("24h", "24H"), ("60m", "60M"), ("2w", "2w"), ("1y", "1y")]
)
def test_expiry_in_the_letters_of_incus(given: str, incus: str) -> None:
    model = model_of(f"domains: {{a: {{machines: {{m: {{snapshots_expiry: {given}}}}}}}}}")
    assert model.state["instances"][0]["config"]["snapshots.expiry"] == incus


def test_config_values_stay_as_they_were_written() -> None:
    model = model_of("""
        domains:
          a:
            machines:
              m:
                config: {a: 1, b: 1.10, c: yes, d: "no", e: 0755, f: 2GiB, g: 1_000, h: 2026-11-20, i: ""}
        """)
    assert model.state["instances"][0]["config"] == {
        "security.protection.delete": "true", "a": "1", "b": "1.10", "c": "true", "d": "no", "e": "0755",
        "f": "2GiB", "g": "1_000", "h": "2026-11-20", "i": "",
    }  # fmt: skip


def test_folder_form_is_read_in_the_order_of_its_files() -> None:
    model = load(str(DATA / "folder"))
    assert list(model.hosts) == ["web-1", "web-2", "db-1"]
    assert model.hosts["web-2"].groups[-1] == "beside"
    assert [Path(f).name for f in model.files] == [
        "base.yml", "10-web.yml", "20-db.yml", "30-later.yml", "policies.yml",
    ]  # fmt: skip
    assert model.all_vars["network_policies"][0]["to"] == "db"


def _folder(where: Path, **files: str) -> Path:
    (where / "domains").mkdir()
    for name, text in files.items():
        (where / (name.replace("__", "/") + ".yml")).write_text(text)
    return where


def test_folder_form_names_the_file_of_each_error(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path,
        base="project_name: p\nglobal: {}\nnetwork_policies: [{from: a, to: host}]\n",
        domains__a="a: {machines: {m: {}}}\n",
        domains__b="a: {}\nb: {machines: {m: {}}}\n",
        domains__c="- c\n",
        domains__d="d: {\n",
        policies="network_policies: []\nother: 1\n",
    )
    with pytest.raises(InfraError) as caught:
        load(str(folder))
    assert [(p.file, p.line, p.path) for p in caught.value.problems] == [
        ("domains/b.yml", 1, "domains.a"),
        ("domains/b.yml", 2, "domains.b.machines.m"),
        ("domains/c.yml", 1, ""),
        ("domains/d.yml", 2, ""),
        ("policies.yml", 1, "network_policies"),
        ("policies.yml", 2, "other"),
    ]


def test_folder_without_a_document(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"neither infra.yml nor base.yml"):
        load(str(tmp_path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match="cannot be read"):
        load(str(tmp_path / "infra.yml"))


def test_classify(tmp_path: Path) -> None:
    folder = _folder(tmp_path, base=HEAD, domains__a="a: {}\n", policies="network_policies: []\n")
    (folder / "roles/r/tasks").mkdir(parents=True)
    (folder / "mine.yml").write_text("# a comment\nplugin: 'sottovoce.stack.infra'  # this\n")
    (folder / "other.yml").write_text("all: {}\n# plugin: sottovoce.stack.infra\n")
    expected = {
        "base.yml": "document", "domains/a.yml": "member", "policies.yml": "member", "mine.yml": "document",
        "other.yml": None, "roles/r/tasks/main.yml": "member", "roles/r/files/infra.yml": "member",
        "infra.yml": "document", "lab.infra.yaml": "document", "hosts.ini": None, "infra.yml.bak": None,
    }  # fmt: skip
    assert {name: classify(str(folder / name)) for name in expected} == expected
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "base.yml").write_text("all: {}\n")
    assert classify(str(alone / "base.yml")) is None
    assert classify(str(alone / "roles/x.yml")) is None


def test_the_key_tables_do_not_overlap() -> None:
    for known, ignored in (
        (schema.GLOBAL_KEYS, schema.GLOBAL_IGNORED),
        (schema.DOMAIN_KEYS, schema.DOMAIN_IGNORED),
        (schema.MACHINE_KEYS, schema.MACHINE_IGNORED),
    ):
        assert not set(known) & set(ignored)
    assert not set(schema.OWN_ROLES) & schema.FOREIGN_ROLES


def test_parse_text_collects_without_raising() -> None:
    assert parse_text("a: [").problems
    assert not parse_text(HEAD + "domains: {}").problems


DOCS = Path(__file__).resolve().parents[2] / "docs" / "infra-yml.md"


def test_every_key_is_documented() -> None:
    text = DOCS.read_text()
    for table in (
        schema.TOP_KEYS,
        schema.GLOBAL_KEYS,
        schema.GLOBAL_IGNORED,
        schema.ADDRESSING_KEYS,
        schema.DOMAIN_KEYS,
        schema.DOMAIN_IGNORED,
        schema.MACHINE_KEYS,
        schema.MACHINE_IGNORED,
        schema.GPU_KEYS,
        schema.VOLUME_KEYS,
        schema.SHARED_KEYS,
        schema.POLICY_KEYS,
        schema.OWN_ROLES,
        tuple(schema.ZONES),
    ):
        for key in table:
            assert re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", text), key


def test_the_errors_in_the_documentation_are_real() -> None:
    bad = """
project_name: home
global:
  addresing: {base_octet: 10}
domains:
  ai-tools:
    machines:
      gpu-server: {gpu: nvidia.com/gpu=0, roles: [base_sistem]}
      webui: {ip: 10.1.1.1, rolls: []}
      webui: {}
""".lstrip()
    with pytest.raises(InfraError) as caught:
        load_text(bad, name="infra.yml")
    shown = DOCS.read_text().split("```text\n")[1].split("\n```")[0]
    assert shown.split("\n")[1:] == str(caught.value).split("\n")[1:]
