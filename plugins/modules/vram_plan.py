#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vram_plan
short_description: Say whether a speech model and language models fit on a card
version_added: 0.1.0
description:
  - Adds up what a speech-to-text model and language models take of a card's VRAM, at rest and at peak, and
    says whether they fit together, fit one at a time, or cannot fit. The formulas, and what they are held
    against, are in docs/vram.md of the collection.
  - Nothing is installed, changed or asked over a network, and no card is needed.
attributes:
  check_mode:
    description: Can run in check mode, and does the same.
    support: full
  diff_mode:
    description: Nothing is changed, so there is no diff.
    support: none
options:
  card_mib:
    description: The card's VRAM in MiB, as nvidia-smi shows it. Wins over O(card).
    type: int
  card:
    description: The card's name, such as V(RTX 3060), instead of its size.
    type: str
  engine:
    description: The speech-to-text engine; V(speaches) works on eight windows of 30 seconds at once.
    type: str
    choices: [speaches, builtin]
    default: speaches
  model:
    description: The Whisper model; V(auto) takes the best that fits, empty plans without one.
    type: str
    default: ""
  live_model:
    description: The second, small model of the engine V(builtin) for live speech; empty plans without one.
    type: str
    default: ""
  compute_type:
    description: Its compute type; V(auto) takes the most exact that fits.
    type: str
    default: float16
  allowed:
    description: The compute types that the card can do; empty for all.
    type: list
    elements: str
    default: []
  llms:
    description:
      - Language models. A model is known by its O(llms[].name), by a GGUF file, or by what Ollama tells.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name, such as V(llama3.1:8b).
        type: str
        required: true
      gguf:
        description: Its file, on the machine that the module runs on.
        type: path
      model_info:
        description: C(model_info) of the answer of Ollama's C(/api/show); needs O(llms[].size).
        type: dict
      size:
        description: Size of the model in bytes, as C(/api/tags) of Ollama has it.
        type: int
  context:
    description: Tokens of context that are taken for each request.
    type: int
    default: 8192
  parallel:
    description: Requests at once to one model.
    type: int
    default: 1
  kv_cache_type:
    description: Type of the KV cache.
    type: str
    choices: [f16, bf16, f32, q8_0, q4_0]
    default: f16
  max_loaded_models:
    description: How many language models stay loaded at once; the largest are counted.
    type: int
    default: 2
  policy:
    description: V(resident) keeps all loaded; with V(yield) and V(exclusive) they take turns.
    type: str
    choices: [resident, yield, exclusive]
    default: resident
  longest_seconds:
    description: The longest recording that is planned for, in seconds.
    type: float
    default: 240
  required:
    description: Fail when the mix does not fit.
    type: bool
    default: false
author:
  - The sottovoce.stack contributors (@sottovoce)
"""

EXAMPLES = r"""
- name: Does this fit on a 12 GB card?
  sottovoce.stack.vram_plan:
    card: RTX 3060
    model: large-v3-turbo
    llms:
      - name: llama3.1:8b
  register: plan

- name: The best speech model beside a file
  sottovoce.stack.vram_plan:
    card_mib: 24564
    model: auto
    compute_type: auto
    llms:
      - name: mine
        gguf: /srv/models/mine.gguf
    required: true
"""

RETURN = r"""
fits:
  description: Whether the card has room for the mix under its policy.
  returned: success
  type: bool
verdict:
  description: fits together, fits one at a time, or cannot fit.
  returned: success
  type: str
card_mib:
  description: The card's VRAM in MiB.
  returned: success
  type: int
need_mib:
  description: What the mix needs at peak, with the driver's part and room to spare, in MiB.
  returned: success
  type: int
model:
  description: The speech model, chosen if it was V(auto).
  returned: success
  type: str
compute_type:
  description: Its compute type, chosen if it was V(auto).
  returned: success
  type: str
fit_target_mib:
  description: What C(LLAMA_ARG_FIT_TARGET) of Ollama should be, in MiB.
  returned: success
  type: int
parts:
  description: Every part with what it takes in MiB.
  returned: success
  type: list
  elements: dict
  sample:
    - {name: large-v3-turbo float16, rest_mib: 2021, peak_mib: 3739, error_mib: 374, parts: {}, source: …}
nearest:
  description: The nearest mixes that fit, when this one does not; each with what to change.
  returned: success
  type: list
  elements: dict
  sample:
    - {change: "ollama_context_length: 4096", need_mib: 12071}
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_plan as vram
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_request as request
from ansible_collections.sottovoce.stack.plugins.module_utils._gguf import GgufError
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_footprint import (
    Llm,
    UnknownModel,
    llm_from_metadata,
)


def language_model(entry: t.Mapping[str, t.Any]) -> Llm:
    if entry.get("gguf"):
        return request.llm_of_file(entry["name"], entry["gguf"])
    if entry.get("model_info"):
        if not entry.get("size"):
            raise UnknownModel(f"llms: {entry['name']} has model_info and no size (bytes, of /api/tags).")
        return llm_from_metadata(entry["name"], entry["model_info"], entry["size"])
    return vram.known_llm(entry["name"])


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "card_mib": {"type": "int"},
            "card": {"type": "str"},
            "engine": {"type": "str", "choices": ["speaches", "builtin"], "default": "speaches"},
            "model": {"type": "str", "default": ""},
            "live_model": {"type": "str", "default": ""},
            "compute_type": {"type": "str", "default": "float16"},
            "allowed": {"type": "list", "elements": "str", "default": []},
            "llms": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "gguf": {"type": "path"},
                    "model_info": {"type": "dict"},
                    "size": {"type": "int"},
                },
            },
            "context": {"type": "int", "default": 8192},
            "parallel": {"type": "int", "default": 1},
            "kv_cache_type": {
                "type": "str",
                "choices": ["f16", "bf16", "f32", "q8_0", "q4_0"],
                "default": "f16",
            },
            "max_loaded_models": {"type": "int", "default": 2},
            "policy": {"type": "str", "choices": ["resident", "yield", "exclusive"], "default": "resident"},
            "longest_seconds": {"type": "float", "default": 240},
            "required": {"type": "bool", "default": False},
        },
        required_one_of=[("card_mib", "card")],
        supports_check_mode=True,
    )
    p = module.params
    try:
        unknown: list[str] = []
        _stt.check_live_model(p["live_model"], p["engine"])
        mix = vram.Mix(
            card_mib=p["card_mib"] if p["card_mib"] is not None else vram.card_mib(p["card"]),
            engine=p["engine"],
            model=request.speech_name(p["model"], unknown) if p["model"] else "",
            live=request.speech_name(p["live_model"], unknown, "live_model") if p["live_model"] else "",
            compute_type=p["compute_type"],
            llms=tuple(language_model(entry) for entry in p["llms"]),
            context=p["context"],
            parallel=p["parallel"],
            kv_type=p["kv_cache_type"],
            loaded=p["max_loaded_models"],
            policy=p["policy"],
            seconds=p["longest_seconds"],
            allowed=tuple(p["allowed"]),
        )
        if unknown:
            raise UnknownModel(f"How much VRAM {unknown[0]} takes is not known.")
        found = vram.choose(mix)
        near = [] if found.ok else vram.nearest(found.mix, turns=True)
    except (_stt.SttError, vram.PlanError, UnknownModel, GgufError, OSError) as error:
        module.fail_json(msg=str(error))
    result: dict[str, t.Any] = {
        "changed": False,
        "fits": found.ok,
        "verdict": found.verdict,
        "card_mib": found.mix.card_mib,
        "need_mib": found.need_mib,
        "model": found.mix.model,
        "compute_type": found.mix.compute_type if found.mix.model else "",
        "fit_target_mib": found.fit_target_mib if found.mix.llms else 0,
        "parts": [request.as_part(part) for part in found.parts],
        "nearest": [{"change": request.in_words(told), "need_mib": tried.need_mib} for tried, told in near],
    }
    if p["required"] and not found.ok:
        ways = "; or ".join(item["change"] for item in result["nearest"]) or "nothing smaller that is known"
        module.fail_json(
            msg=f"The mix needs {found.need_mib} of {found.mix.card_mib} MiB ({found.verdict}). Would"
            f" fit: {ways}.",
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
