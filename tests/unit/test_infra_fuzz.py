# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever the bytes: a whole model, or an InfraError. Nothing else, nothing in part."""

from __future__ import annotations

import copy
import ipaddress
import json
import random
from typing import Any

import yaml
from _infra_support import DATA
from ansible_collections.sottovoce.stack.plugins.module_utils import _infra_schema as schema
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_model import Model, load_text
from ansible_collections.sottovoce.stack.plugins.module_utils._infra_schema import InfraError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = [yaml.safe_load((DATA / name).read_text()) for name in ("home.infra.yml", "every-key.infra.yml")]
SEEDS.append(yaml.safe_load((DATA / "anklume/infra.yml").read_text()))

WORDS = sorted(
    {*schema.TOP_KEYS, *schema.GLOBAL_KEYS, *schema.DOMAIN_KEYS, *schema.MACHINE_KEYS, *schema.GPU_KEYS,
     *schema.VOLUME_KEYS, *schema.POLICY_KEYS, *schema.SHARED_KEYS, *schema.OWN_ROLES, *schema.ZONES,
     "type", "disk", "gpu", "default", "host", "ai-tools", "gpu-server", "10.120.0.1", "1:2", "<<", "0x_",
     "nvidia.com/gpu=0", "01:00.0", "/srv", "ro", "all", "images:debian/13", "{{ x }}", "y", "~", "=", ""}
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), scalars), inner, max_size=5),
    ),
    max_leaves=12,
)


def whole_or_error(text: str | bytes) -> Model | None:
    refused: InfraError | None = None
    try:
        model = load_text(text)
    except InfraError as error:
        refused = error
    if refused is not None:
        assert refused.problems
        assert str(refused).count("\n") >= len(refused.problems)
        assert all(problem.message and problem.line >= 0 for problem in refused.problems)
        return None
    assert json.loads(json.dumps(model.state)) == model.state
    assert {i["name"] for i in model.state["instances"]} == set(model.hosts)
    for name, group in model.groups.items():
        assert set(group.hosts) == {h for h, host in model.hosts.items() if name in host.groups}
    projects = {p["name"] for p in model.state["projects"]}
    networks = {n["name"] for n in model.state["networks"]}
    assert all(len(n) <= 15 for n in networks)
    for instance in model.state["instances"]:
        assert instance["project"] in projects
    return model


@FUZZ
@given(st.binary(max_size=200))
def test_bytes(data: bytes) -> None:
    whole_or_error(data)


@FUZZ
@given(st.text(alphabet="abc:-{}[]&*!|>'\"#%@,?<= \t\n~01", max_size=80))
def test_text_that_looks_like_yaml(text: str) -> None:
    whole_or_error(text)
    whole_or_error("project_name: p\nglobal: {}\ndomains:\n" + text)


@FUZZ
@given(values)
def test_any_document(document: Any) -> None:
    whole_or_error(yaml.safe_dump(document, allow_unicode=True))


@FUZZ
@given(values, st.sampled_from(["domain", "machine", "global", "policy", "shared"]))
def test_any_body_in_the_right_place(body: Any, place: str) -> None:
    document: dict[str, Any] = {"project_name": "p", "global": {}, "domains": {"a": {"machines": {"m": {}}}}}
    if place == "domain":
        document["domains"]["b"] = body
    elif place == "machine":
        document["domains"]["a"]["machines"]["n"] = body
    elif place == "global":
        document["global"] = body
    elif place == "policy":
        document["network_policies"] = [body]
    else:
        document["shared_volumes"] = {"v": body}
    whole_or_error(yaml.safe_dump(document, allow_unicode=True))


def _spots(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += [(value, key), *_spots(item)]
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += [(value, i), *_spots(item)]
    return found


@FUZZ
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 4), values)
def test_mutations_of_valid_documents(seed: Any, chance: int, times: int, value: Any) -> None:
    document = copy.deepcopy(seed)
    dice = random.Random(chance)  # noqa: S311
    for _unused in range(times):
        spots = _spots(document)
        if not spots:
            break
        where, key = dice.choice(spots)
        match dice.randrange(4):
            case 0:
                del where[key]
            case 1:
                where[key] = copy.deepcopy(value)
            case 2:
                where[key] = copy.deepcopy(dice.choice(spots)[0])
            case _ if isinstance(where, dict):
                where[dice.choice(WORDS)] = where.pop(key)
    whole_or_error(yaml.safe_dump(document, allow_unicode=True))


@FUZZ
@given(st.sampled_from(sorted(p.name for p in DATA.glob("*.yml"))), st.data())
def test_mutations_of_valid_text(name: str, data: st.DataObject) -> None:
    raw = bytearray((DATA / name).read_bytes())
    for _unused in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 40))]
        if not raw:
            break
    whole_or_error(bytes(raw))


names = st.from_regex(r"[a-z]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True).filter(
    lambda n: n not in {"all", "host", "default", "ungrouped", "instances", "localhost"}
)
domains = st.dictionaries(
    names,
    st.fixed_dictionaries(
        {
            "trust_level": st.sampled_from(sorted(schema.ZONES)),
            "enabled": st.booleans(),
            "count": st.integers(0, 12),
        }
    ),
    max_size=8,
)


def _document(spec: dict[str, Any]) -> str:
    return yaml.safe_dump(
        {
            "project_name": "p",
            "global": {},
            "domains": {
                name: {
                    "trust_level": d["trust_level"],
                    "enabled": d["enabled"],
                    "machines": {f"m-{name}-m{i}-m": {} for i in range(d["count"])},
                }
                for name, d in spec.items()
            },
        },
        sort_keys=False,
    )


def _addresses(model: Model) -> dict[str, str]:
    return {i["name"]: i["devices"]["eth0"]["ipv4.address"] for i in model.state["instances"]}


@FUZZ
@given(domains)
def test_addresses_are_unique_in_their_subnet_and_the_same_every_time(spec: dict[str, Any]) -> None:
    model = load_text(_document(spec))
    found = _addresses(model)
    assert len(set(found.values())) == len(found)
    assert found == _addresses(load_text(_document(spec)))
    nets = [g.vars["incus_network"]["subnet"] for n, g in model.groups.items() if "incus_network" in g.vars]
    assert len(set(nets)) == len(nets)
    for name, host in model.hosts.items():
        subnet = model.groups[host.groups[1]].vars["incus_network"]["subnet"]
        assert ipaddress.ip_address(found[name]) in ipaddress.ip_network(subnet)
        assert 1 <= int(found[name].rsplit(".", 1)[1]) <= 99


@FUZZ
@given(domains.filter(bool), st.data())
def test_switching_a_domain_moves_nobody(spec: dict[str, Any], data: st.DataObject) -> None:
    before = _addresses(load_text(_document(spec)))
    name = data.draw(st.sampled_from(sorted(spec)))
    spec[name]["enabled"] = not spec[name]["enabled"]
    after = _addresses(load_text(_document(spec)))
    for machine in before.keys() & after.keys():
        assert before[machine] == after[machine]


@FUZZ
@given(domains, st.randoms(use_true_random=False))
def test_the_order_of_domains_does_not_matter(spec: dict[str, Any], dice: random.Random) -> None:
    shuffled = list(spec.items())
    dice.shuffle(shuffled)
    assert _addresses(load_text(_document(spec))) == _addresses(load_text(_document(dict(shuffled))))
