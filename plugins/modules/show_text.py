#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: show_text
short_description: Show lines as they are
version_added: 0.1.0
description:
  - Writes lines to the output of the run without quotes and without wrapping, whatever the callback is.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  lines:
    description: What to show.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
notes:
  - Runs on the controller and needs no connection.
"""

EXAMPLES = r"""
- name: Show a table
  sottovoce.stack.show_text:
    lines:
      - MACHINE  STATE
      - webui    running
"""

RETURN = r""" # """
