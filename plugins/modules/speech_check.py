#!/usr/bin/python
# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: speech_check
short_description: Send a recorded sentence to a speech-to-text route and compare the text
version_added: 0.1.0
description:
  - Sends a WAV file to Open WebUI's own transcription route, as its microphone button does, or to any
    server that speaks OpenAI's C(/v1/audio/transcriptions), and returns the text that comes back.
author:
  - The sottovoce.stack contributors (@sottovoce)
options:
  url:
    description: Base URL, for example V(http://127.0.0.1:3000) for Open WebUI or V(http://127.0.0.1:8000/v1).
    type: str
    required: true
  api:
    description: Which route is meant.
    type: str
    choices: [open_webui, openai]
    default: open_webui
  credentials_file:
    description: JSON file on the target with C(email) and C(password) of an Open WebUI account.
    type: path
  api_key:
    description: Bearer key for O(api=openai).
    type: str
    default: ""
  model:
    description: Model named in the request for O(api=openai).
    type: str
    default: whisper-1
  language:
    description: Language of the sentence (ISO 639-1); empty lets the server decide.
    type: str
    default: ""
  audio:
    description: WAV file on the controller, looked for as the module M(ansible.builtin.copy) does.
    type: str
    required: true
  content:
    description: The file in base64; set by the action plugin.
    type: str
    default: ""
  expected:
    description: What is said in it; empty skips the comparison.
    type: str
    default: ""
  max_word_error_rate:
    description: Fail when more than this share of the expected words is wrong (0 to 1).
    type: float
    default: 0.5
  timeout:
    description: Seconds for each request.
    type: float
    default: 60
attributes:
  check_mode:
    support: full
    description: Changes nothing on the target; the sentence is sent in check mode too.
  diff_mode:
    support: none
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Say a sentence to Open WebUI
  sottovoce.stack.speech_check:
    url: http://127.0.0.1:3000
    credentials_file: /etc/sottovoce/open-webui-admin.json
    audio: sentence.wav
    expected: Open the window in the bathroom.
"""

RETURN = r"""
text:
  description: What was heard.
  returned: success
  type: str
word_error_rate:
  description: Share of the expected words that were heard wrong; 0 is perfect.
  returned: when O(expected) is set
  type: float
seconds:
  description: Time from sending to the text, in seconds.
  returned: success
  type: float
"""

import base64
import json
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sottovoce.stack.plugins.module_utils import _speech_check as speech


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "api": {"type": "str", "choices": ["open_webui", "openai"], "default": "open_webui"},
            "credentials_file": {"type": "path"},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "model": {"type": "str", "default": "whisper-1"},
            "language": {"type": "str", "default": ""},
            "audio": {"type": "str", "required": True},
            "content": {"type": "str", "default": "", "no_log": True},
            "expected": {"type": "str", "default": ""},
            "max_word_error_rate": {"type": "float", "default": 0.5},
            "timeout": {"type": "float", "default": 60},
        },
        required_if=[("api", "open_webui", ["credentials_file"])],
        supports_check_mode=True,
    )
    params = module.params
    base, timeout = params["url"].rstrip("/"), params["timeout"]
    if not base.startswith(("http://", "https://")):
        module.fail_json(msg=f"url must begin with http:// or https://, not {params['url']!r}")
    fields = {"language": params["language"]} if params["language"] else {}
    try:
        audio = base64.b64decode(params["content"], validate=True)
        if params["api"] == "open_webui":
            with open(params["credentials_file"], encoding="utf-8") as handle:
                account = json.load(handle)
            module.no_log_values.add(account["password"])
            token = speech.sign_in(base, account["email"], account["password"], timeout)
            url = f"{base}/api/v1/audio/transcriptions"
        else:
            token, url = params["api_key"], f"{base}/audio/transcriptions"
            fields["model"] = params["model"]
        started = time.monotonic()
        text = speech.transcribe(url, audio, token=token, fields=fields, timeout=timeout)
    except (speech.SpeechCheckError, OSError, KeyError, ValueError) as error:
        module.fail_json(msg=f"The sentence was not heard: {error}")
    result = {"changed": False, "text": text, "seconds": round(time.monotonic() - started, 3)}
    if params["expected"]:
        rate = speech.word_error_rate(params["expected"], text)
        result["word_error_rate"] = round(rate, 3)
        if rate > params["max_word_error_rate"]:
            module.fail_json(
                msg=f"The sentence {params['expected']!r} was heard as {text!r}. "
                "Is the right model loaded (playbook status), and is the language right?",
                **result,
            )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
