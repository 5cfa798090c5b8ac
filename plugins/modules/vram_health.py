#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vram_health
short_description: Tell who uses the VRAM of a machine, and whether it is as it should be
version_added: 0.1.0
description:
  - Reads the cards (NVML through ctypes, else nvidia-smi, else sysfs for AMD), the processes that use them
    with their systemd units, and what Ollama, Speaches and voicegate say of their loaded models, all at once.
  - Inside an unprivileged container the driver may list no processes. Then the units that have the card open
    get what is used by difference, and each unit's C(source) and the C(notes) say so.
  - Judges it by thresholds and by a plan. What is not as it should be is a finding with its remedy. The
    module fails only where O(fail_on) asks for it.
  - A machine without a card is answered cleanly; it is a finding only with O(require_gpu).
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  min_free_mib:
    description: A card (or MIG slice) with less free VRAM in MiB than this is a C(fail).
    type: int
    default: 256
  max_used_percent:
    description: A card of which more than this is used, what the driver reserves included, is a C(warn).
    type: float
    default: 98
  max_temperature:
    description: A card hotter than this, in degrees Celsius, is a C(warn).
    type: int
    default: 85
  max_ecc_corrected:
    description: More corrected memory errors than this since the driver was loaded are a C(warn).
    type: int
    default: 100
  max_ecc_uncorrected:
    description: More uncorrectable memory errors than this since the driver was loaded are a C(fail).
    type: int
    default: 0
  xid_max_age:
    description:
      - Xid errors of the driver count for so many seconds. Those after which a card needs a reset are a
        C(fail), the others a C(warn). They stand in the kernel's log, which a container may not be allowed
        to read.
    type: int
    default: 86400
  require_gpu:
    description: Whether a machine without any card is a C(fail).
    type: bool
    default: false
  require_full_offload:
    description:
      - Whether a model of Ollama that is partly on the CPU is a C(fail), and a speech model of voicegate on
        the CPU of a machine with a card a C(warn).
    type: bool
    default: true
  expected_units:
    description:
      - Units (without C(.service)) that are meant to use the cards. One that is not active is a C(fail); any
        other unit or process that uses VRAM is a C(warn). If empty, nobody is missed and nobody is too many.
    type: list
    elements: str
    default: []
  plan:
    description:
      - What each unit is meant to use in MiB, by unit name. The value is a number, or a mapping with
        C(rest_mib) (loaded, idle) and C(peak_mib).
      - To use less than planned is no finding, because models are unloaded when idle.
    type: dict
    default: {}
  max_drift_percent:
    description: A unit that uses so much more than its planned peak is a C(warn).
    type: float
    default: 10
  fail_on:
    description: From which status on the module fails.
    type: str
    choices: [never, fail, warn]
    default: never
  unit_path:
    description: Folder with the unit files.
    type: path
    default: /etc/systemd/system
  timeout:
    description: Seconds that each daemon has to answer.
    type: float
    default: 0.3
  gpu_timeout:
    description: Seconds that the driver has to answer. One that must wake a card first takes a while.
    type: float
    default: 5
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
seealso:
  - module: sottovoce.stack.service_health_info
"""

EXAMPLES = r"""
- name: Look at the VRAM
  sottovoce.stack.vram_health:
  register: vram

- name: Stop the play when a card is full, or holds more than is planned
  sottovoce.stack.vram_health:
    min_free_mib: 1024
    expected_units: [ollama, speaches]
    plan:
      ollama: 9200
      speaches: {rest_mib: 2100, peak_mib: 3300}
    fail_on: warn
"""

RETURN = r"""
status:
  description: C(ok), C(warn) or C(fail), the worst of the findings.
  returned: always
  type: str
findings:
  description: What is not as it should be, the worst first.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      type: str
      description:
        - One of C(driver-mismatch), C(gpu-unreadable), C(no-gpu), C(gpu-lost), C(mig-unreadable),
          C(low-free), C(high-use), C(temperature), C(throttling), C(ecc-corrected), C(ecc-uncorrected),
          C(xid), C(partial-offload), C(stt-on-cpu), C(two-copies), C(drift), C(unit-missing),
          C(unit-unexpected).
    severity: {type: str, description: C(warn) or C(fail).}
    what: {type: str, description: 'What is wrong, and where.'}
    why: {type: str, description: The threshold or the cause.}
    remedy: {type: str, description: What to do.}
source:
  description: Where the figures of the cards come from; C(nvml), C(nvidia-smi), C(amdgpu) or C(none).
  returned: always
  type: str
driver:
  description: Version of the driver; empty if not known.
  returned: always
  type: str
cuda:
  description: Newest CUDA version that the driver can run; empty if not known (nvidia-smi, AMD).
  returned: always
  type: str
gpus:
  description: One entry per card. Null in a field means that the card does not tell.
  returned: always
  type: list
  elements: dict
  contains:
    index: {type: int, description: Number of the card.}
    vendor: {type: str, description: C(nvidia) or C(amd).}
    uuid: {type: str, description: UUID of the card.}
    pci: {type: str, description: 'Address as in sysfs, such as C(0000:01:00.0).'}
    name: {type: str, description: Name of the card.}
    capability: {type: str, description: 'CUDA compute capability, such as C(8.6).'}
    total_mib: {type: int, description: All of its memory in MiB.}
    used_mib: {type: int, description: 'Used, in MiB.'}
    free_mib: {type: int, description: 'Free, in MiB.'}
    reserved_mib: {type: int, description: 'Kept by the driver, in MiB; 0 where that is part of used.'}
    temperature_c: {type: int, description: Temperature in degrees Celsius.}
    throttling: {type: list, elements: str, description: 'Why it is slowed down: heat, power.'}
    clock_reasons: {type: list, elements: str, description: 'All reasons for its clock, C(idle) for example.'}
    ecc_corrected: {type: int, description: Corrected memory errors since the driver was loaded.}
    ecc_uncorrected: {type: int, description: Uncorrectable ones.}
    xid:
      type: list
      elements: dict
      description: Xid errors since boot, each with C(xid) and C(at) in seconds since boot; null if not known.
    mig:
      type: list
      elements: dict
      description:
        - Slices in MIG mode, each with C(uuid), C(name), C(gpu_instance), C(total_mib), C(used_mib),
          C(free_mib), C(reserved_mib) and C(error).
    error: {type: str, description: Why the card could not be read; empty if it could.}
units:
  description: The units of this collection here, and whoever else uses a card.
  returned: always
  type: list
  elements: dict
  contains:
    name: {type: str, description: 'Unit without C(.service); C(pid N) for a process outside of units.'}
    state: {type: str, description: ActiveState of systemd; null for units that are not of this collection.}
    used_mib: {type: int, description: VRAM on all cards in MiB; null if it cannot be known.}
    source:
      type: str
      description:
        - C(processes) as the driver lists them, C(difference), C(unknown) (several units share what the
          driver does not explain), or C(none).
    gpus: {type: list, elements: dict, description: The same per card; C(gpu) (its index) and C(used_mib).}
    pids: {type: list, elements: int, description: Its processes that the driver lists.}
    plan_rest_mib: {type: int, description: 'Of O(plan), MiB.'}
    plan_peak_mib: {type: int, description: 'Of O(plan), MiB.'}
    drift_percent:
      type: float
      description: How far it is above the planned peak (positive) or below the planned rest (negative).
models:
  description: What the daemons say that they have loaded.
  returned: always
  type: list
  elements: dict
  contains:
    unit: {type: str, description: Unit of the daemon.}
    engine: {type: str, description: 'C(ollama), C(speaches), or what voicegate says of its engine.'}
    name: {type: str, description: Name of the model.}
    loaded: {type: bool, description: Whether it is in memory.}
    size_mib: {type: int, description: Whole size in MiB (Ollama).}
    vram_mib: {type: int, description: Part of it in VRAM in MiB (Ollama).}
    offload_percent: {type: int, description: 'That part in percent, rounded down (Ollama).'}
    context: {type: int, description: Context length in tokens (Ollama).}
    device: {type: str, description: C(cuda) or C(cpu) (voicegate).}
    compute_type: {type: str, description: Compute type in effect (voicegate).}
    state: {type: str, description: 'C(loaded), C(unloaded), … (voicegate).'}
xid_readable:
  description: Whether the kernel's log could be read for Xid errors.
  returned: always
  type: bool
notes:
  description: How figures were come by, and what could not be known.
  returned: always
  type: list
  elements: str
seconds:
  description: How long the reading took.
  returned: always
  type: float
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_facts import read_facts
from ansible_collections.sottovoce.stack.plugins.module_utils._vram_health import (
    RANK,
    Thresholds,
    plan_of,
    report,
)


def main() -> None:
    limits = {
        "min_free_mib": {"type": "int", "default": 256},
        "max_used_percent": {"type": "float", "default": 98},
        "max_temperature": {"type": "int", "default": 85},
        "max_ecc_corrected": {"type": "int", "default": 100},
        "max_ecc_uncorrected": {"type": "int", "default": 0},
        "xid_max_age": {"type": "int", "default": 86400},
        "require_gpu": {"type": "bool", "default": False},
        "require_full_offload": {"type": "bool", "default": True},
        "expected_units": {"type": "list", "elements": "str", "default": []},
        "max_drift_percent": {"type": "float", "default": 10},
    }
    module = AnsibleModule(
        argument_spec={
            **limits,
            "plan": {"type": "dict", "default": {}},
            "fail_on": {"type": "str", "choices": ["never", "fail", "warn"], "default": "never"},
            "unit_path": {"type": "path", "default": "/etc/systemd/system"},
            "timeout": {"type": "float", "default": 0.3},
            "gpu_timeout": {"type": "float", "default": 5},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        plan = plan_of(given["plan"])
    except ValueError as error:
        module.fail_json(msg=str(error))
    begin = time.monotonic()
    facts = read_facts(
        given["unit_path"], module.get_bin_path("nvidia-smi"), given["timeout"], given["gpu_timeout"]
    )
    result = report(facts, Thresholds(**{key: given[key] for key in limits}), plan)
    result["seconds"] = round(time.monotonic() - begin, 3)
    if given["fail_on"] != "never" and RANK[result["status"]] >= RANK[given["fail_on"]]:
        lines = [f"{found['what']}: {found['why']}. {found['remedy']}" for found in result["findings"]]
        module.fail_json(msg="\n".join(lines), changed=False, **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
