# Copyright: (c) 2026, The sottovoce.stack contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VRAM plan: held against published peaks, its properties, and what people are told."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import vram_docs
import yaml
from ansible_collections.sottovoce.stack.plugins.filter import vram as filters
from ansible_collections.sottovoce.stack.plugins.module_utils import _stt, _vram_chart
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_footprint as footprint
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_plan as vram
from ansible_collections.sottovoce.stack.plugins.module_utils import _vram_request as request_
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
CARDS = st.integers(2048, 81920)
MODELS = st.sampled_from(sorted(footprint.WHISPER))
TYPES = st.sampled_from(sorted(footprint.WEIGHT_BYTES))
LLMS = st.lists(st.sampled_from(list(vram.known_llms())), max_size=3, unique=True)
CONTEXTS = st.integers(512, 65536)
KV = st.sampled_from(sorted(footprint.KV_BYTES))


@st.composite
def mixes(draw: st.DrawFn, /, **fixed: Any) -> vram.Mix:
    values: dict[str, Any] = {
        "card_mib": draw(CARDS),
        "engine": draw(st.sampled_from(["speaches", "builtin"])),
        "model": draw(st.one_of(st.just(""), MODELS)),
        "compute_type": draw(TYPES),
        "llms": tuple(vram.known_llm(name) for name in draw(LLMS)),
        "context": draw(CONTEXTS),
        "parallel": draw(st.integers(1, 4)),
        "kv_type": draw(KV),
        "loaded": draw(st.integers(1, 3)),
        "policy": draw(st.sampled_from(vram.POLICIES)),
        "seconds": draw(st.floats(0.5, 7200)),
    }
    return vram.Mix(**{**values, **fixed})


# Peaks of faster-whisper (its README, large-v2 with batches) and of the distillations (their cards), MiB.
@pytest.mark.parametrize(("model", "kind", "batch", "measured"), vram_docs.MEASURED)
def test_formula_is_within_ten_percent_of_each_published_peak(
    model: str, kind: str, batch: int, measured: int
) -> None:
    found = footprint.stt(model, kind, batch)
    assert abs(found.peak - measured) <= 0.10 * measured
    assert found.low <= measured <= found.high


def test_llama_8b_by_hand() -> None:
    found = footprint.llm(vram.known_llm("llama3.1:8b"), 8192)
    # 2 x 32 layers x 8 heads x 128 x 8192 tokens x 2 bytes = 1 GiB
    assert found.parts["KV cache"] == 1024
    assert found.rest == found.peak == sum(found.parts.values())


def test_context_is_cut_to_what_the_model_was_trained_for() -> None:
    model = dataclasses.replace(vram.known_llm("qwen2.5:7b"), trained_context=4096)
    assert footprint.llm(model, 32768).peak == footprint.llm(model, 4096).peak


def test_each_model_of_the_roles_table_has_figures() -> None:
    assert set(_stt.MODELS) == set(footprint.WHISPER)
    assert set(_stt.QUANTIZATIONS) - {"auto"} == set(footprint.WEIGHT_BYTES)


@given(mixes())
def test_totals_add_up(mix: vram.Mix) -> None:
    found = vram.fit(mix)
    for part in found.parts:
        assert part.rest <= part.peak
        assert part.peak == sum(part.parts.values())
    assert found.together_mib >= vram.DRIVER_MIB + sum(part.peak for part in found.parts)
    assert len(found.llms) == min(mix.loaded, len(mix.llms))
    assert found.ok is (found.need_mib <= mix.card_mib)
    assert (found.verdict == vram.TOGETHER) is (found.together_mib <= mix.card_mib)


@given(mixes(), st.integers(0, 32768))
def test_more_vram_never_fits_worse(mix: vram.Mix, more: int) -> None:
    order = [vram.CANNOT, vram.ONE_AT_A_TIME, vram.TOGETHER]
    larger = dataclasses.replace(mix, card_mib=mix.card_mib + more)
    assert order.index(vram.fit(larger).verdict) >= order.index(vram.fit(mix).verdict)


@settings(max_examples=60)
@given(mixes(model="auto", compute_type="auto"), st.integers(0, 32768))
def test_more_vram_never_chooses_worse(mix: vram.Mix, more: int) -> None:
    def rank(found: vram.Fit) -> tuple[bool, int, int]:
        quality = -vram.AUTO_TYPES.index(found.mix.compute_type)
        return found.ok, -vram.AUTO_MODELS.index(found.mix.model), quality

    larger = dataclasses.replace(mix, card_mib=mix.card_mib + more)
    assert rank(vram.choose(larger)) >= rank(vram.choose(mix))


@given(mixes(), CONTEXTS, st.integers(1, 8), KV)
def test_monotone_in_context_batch_and_bits(mix: vram.Mix, context: int, parallel: int, kv: str) -> None:
    need = vram.fit(mix).together_mib
    if context >= mix.context:
        assert vram.fit(dataclasses.replace(mix, context=context)).together_mib >= need
    if parallel >= mix.parallel:
        assert vram.fit(dataclasses.replace(mix, parallel=parallel)).together_mib >= need
    if footprint.KV_BYTES[kv] >= footprint.KV_BYTES[mix.kv_type]:
        assert vram.fit(dataclasses.replace(mix, kv_type=kv)).together_mib >= need
    assert vram.fit(dataclasses.replace(mix, seconds=mix.seconds + 30)).together_mib >= need
    for kind, size in footprint.WEIGHT_BYTES.items():
        if size >= footprint.WEIGHT_BYTES[mix.compute_type]:
            assert vram.fit(dataclasses.replace(mix, compute_type=kind)).together_mib >= need


@given(mixes(engine="builtin"), MODELS)
def test_a_live_model_never_needs_less(mix: vram.Mix, live: str) -> None:
    alone, both = vram.fit(mix), vram.fit(dataclasses.replace(mix, live=live))
    assert both.together_mib >= alone.together_mib
    assert both.one_mib >= alone.one_mib
    if alone.speech is None or both.speech is None:
        assert alone.parts == both.parts
        return
    assert both.speech.rest >= alone.speech.rest
    assert both.speech.peak >= alone.speech.peak
    if mix.model != live:
        small = footprint.stt(live, mix.compute_type)
        # The weights of both, and what is shared once: the context at rest, the larger working set at work.
        assert both.speech.rest == alone.speech.rest + small.parts["weights"]
        assert both.speech.parts["working set"] == max(
            alone.speech.parts["working set"], small.parts["working set"]
        )
        assert both.speech.peak < alone.speech.peak + small.peak
    # Ollama sees what is loaded as used, and leaves the rest.
    assert both.fit_target_mib + both.speech.rest >= alone.fit_target_mib + alone.speech.rest


@given(mixes(policy="resident"))
def test_fit_target_covers_what_speech_still_takes_and_moves_no_planned_layer(mix: vram.Mix) -> None:
    found = vram.fit(mix)
    if found.speech is None:
        assert found.fit_target_mib == vram.FREE_MIB
        return
    assert found.fit_target_mib >= vram.FREE_MIB + found.speech.peak - found.speech.rest
    if not found.llms:
        assert found.fit_target_mib >= 1024 + found.speech.peak
    elif found.verdict == vram.TOGETHER:
        loaded = vram.DRIVER_MIB + found.speech.rest + sum(part.peak for part in found.llms)
        # With all of it loaded, llama.cpp still sees what it is told to leave free.
        assert mix.card_mib - loaded >= found.fit_target_mib
        if mix.card_mib - loaded >= 1024 + found.speech.high:
            assert found.fit_target_mib == 1024 + found.speech.high


@settings(max_examples=60, deadline=None)
@given(mixes(policy="resident"))
def test_what_is_proposed_fits_and_differs(mix: vram.Mix) -> None:
    found = vram.fit(mix)
    if found.ok:
        return
    near = vram.nearest(mix)
    assert vram.nearest(mix) == near
    assert len(near) <= 3
    for tried, told in near:
        assert tried.ok
        assert told
        assert tried == vram.fit(dataclasses.replace(mix, **told))
    assert len({repr(told) for _tried, told in near}) == len(near)


def test_an_impossible_mix_names_three_ways_out() -> None:
    mix = vram.Mix(
        12288, model="large-v3-turbo", llms=(vram.known_llm("llama3.1:8b"), vram.known_llm("qwen3:4b"))
    )
    assert not vram.fit(mix).ok
    ways = [request_.in_words(told) for _tried, told in vram.nearest(mix)]
    assert len(ways) == 3
    assert ways[0] == "ollama_max_loaded_models: 1"


def test_turns_are_only_proposed_where_something_takes_them() -> None:
    mix = vram.Mix(12288, model="large-v3", llms=(vram.known_llm("qwen2.5:14b"),))
    assert all("policy" not in told for _tried, told in vram.nearest(mix))
    assert any("policy" in told for _tried, told in vram.nearest(mix, turns=True))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"card_mib": 0}, "MiB"),
        ({"policy": "both"}, "resident, yield, exclusive"),
        ({"parallel": 0}, "1 or more"),
        ({"model": "huge"}, "'huge'"),
        ({"model": "tiny", "compute_type": "int3"}, "int3"),
        ({"kv_type": "q2", "llms": (vram.known_llm("phi4"),)}, "q2"),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises((vram.PlanError, footprint.UnknownModel), match=text):
        vram.fit(vram.Mix(**{"card_mib": 8192, **changes}))


def test_cards_by_name() -> None:
    assert vram.card_mib("NVIDIA GeForce RTX 3060") == vram.card_mib("rtx3060") == 12288
    with pytest.raises(vram.PlanError, match="RTX 4090"):
        vram.card_mib("RTX 4091")


# Metadata


LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.context_length": 131072,
}


def test_metadata_gives_what_the_table_says() -> None:
    found = footprint.llm_from_metadata("x", LLAMA, 4921 * 10**6)
    known = vram.known_llm("llama3.1:8b")
    assert (found.kv, found.weights_mib, found.trained_context) == (known.kv, known.weights_mib, 131072)


def test_layers_without_attention_take_no_cache() -> None:
    hybrid = {**LLAMA, "llama.attention.head_count_kv": [8, 0] * 16, "llama.attention.key_length": 256}
    assert sum(footprint.llm_from_metadata("x", hybrid, 1).kv) == 16 * 8 * (256 + 128)


@pytest.mark.parametrize(
    "broken",
    [{}, {"general.architecture": "llama"}, {**LLAMA, "llama.attention.head_count_kv": [8]}],
)
def test_metadata_without_the_needed_is_unknown(broken: dict[str, Any]) -> None:
    with pytest.raises(footprint.UnknownModel):
        footprint.llm_from_metadata("x", broken, 1)


# From variables


GPU = {"instance_gpu": True, "instance_roles": ["stt_server", "ollama_server"]}


def test_defaults_are_those_of_the_roles() -> None:
    for role, known in (("stt_server", request_.STT_DEFAULTS), ("ollama_server", request_.OLLAMA_DEFAULTS)):
        defaults = yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text(encoding="utf-8"))
        assert {name: defaults[name] for name in known} == dict(known)


def test_plan_of_a_machine() -> None:
    plan = request_.plan({**GPU, "gpu_card": "RTX 3090", "ollama_default_model": "llama3.1:8b"})
    assert (plan["status"], plan["verdict"], plan["card_mib"]) == ("fits", "fits together", 24576)
    assert [part["name"] for part in plan["parts"]] == [
        "large-v3-turbo float16",
        "llama3.1:8b",
        "nomic-embed-text",
    ]
    # Where Speaches cannot be had, voicegate runs instead, and takes one window at a time.
    assert set(plan["units"]) == {"speaches", "voicegate", "ollama"}
    assert plan["units"]["speaches"]["peak_mib"] == plan["parts"][0]["peak_mib"] == 3739
    assert plan["units"]["voicegate"]["peak_mib"] == 2403
    alone = request_.plan({**GPU, "gpu_card": "RTX 3090", "stt_server_engine_fallback": ""})
    assert set(alone["units"]) == {"speaches", "ollama"}
    assert filters.vram_plan_fit_target({"a": plan}) == plan["settings"]["fit_target_mib"] > 1024
    assert filters.vram_plan_units({"a": plan}) == plan["units"]


def test_short_names_of_ollamas_variables_win() -> None:
    plan = request_.plan(
        {**GPU, "gpu_vram_mib": 24576, "ollama_server_context_length": 1, "ollama_context_length": 4096}
    )
    assert plan["settings"]["context_length"] == 4096


def test_a_misfit_is_refused_with_ways_out() -> None:
    plans = filters.vram_plans(
        ["gpu"], {"gpu": {**GPU, "gpu_vram_mib": 8192, "ollama_default_model": "phi4"}}
    )
    lines = filters.vram_plan_refusals(plans)
    assert lines[0] == "gpu:"
    assert sum(line.startswith("Would fit") for line in lines) == 3
    assert filters.vram_plan_fit_target(plans) == 0


def test_unknown_sizes_refuse_nothing_and_are_told() -> None:
    hosts = {
        "a": GPU,
        "b": {**GPU, "gpu_vram_mib": 4096, "ollama_extra_models": ["strange:1b"]},
        "c": {**GPU, "instance_gpu": False, "gpu_vram_mib": 1024},
    }
    plans = filters.vram_plans(hosts, hosts)
    assert list(plans) == ["a", "b"]
    assert filters.vram_plan_refusals(plans) == []
    notes = filters.vram_plan_notes(plans)
    assert "gpu_vram_mib" in notes[0]
    assert "strange:1b" in notes[1]
    # A machine that got no card (gpu: {optional: true}) needs no plan.
    nothing = {"instances": [{"name": "a", "gpu": [], "cards": []}, {"name": "b", "gpu": ["x"], "cards": []}]}
    assert list(filters.vram_plans(["a", "b"], hosts | {"localhost": {"sottovoce_infra": nothing}})) == ["b"]


def test_auto_is_what_fits_and_what_the_card_can_do() -> None:
    auto = {
        **GPU,
        "stt_server_model": "auto",
        "stt_server_quantization": "auto",
        "ollama_default_model": "qwen3:8b",
    }
    for mib, capability, model, kind in (
        (24576, "8.6", "large-v3", "float16"),
        (12288, "8.6", "large-v3-turbo", "int8_float16"),
        (24576, "6.1", "large-v3", "int8"),
    ):
        cards = [{"vendor": "nvidia", "capability": capability}]
        infra = {"instances": [{"name": "a", "gpu": ["x"], "cards": cards}]}
        hosts = {"a": {**auto, "gpu_vram_mib": mib}, "localhost": {"sottovoce_infra": infra}}
        plans = filters.vram_plans(["a"], hosts)
        assert filters.vram_plan_speech(plans) == {"model": model, "quantization": kind}
    assert filters.vram_plan_speech(filters.vram_plans(["a"], {"a": auto})) == {}


def test_turns_are_carried_out_by_the_builtin_engine() -> None:
    """What fits only one at a time: refused with turns proposed, then taken, and told to voicegate."""
    tight = {
        **GPU,
        "gpu_vram_mib": 8192,
        "stt_server_engine": "builtin",
        "ollama_default_model": "llama3.1:8b",
        "ollama_context_length": 4096,
    }
    assert "yield" in " ".join(request_.plan(tight)["lines"])
    plan = request_.plan({**tight, "vram_policy": "yield"})
    assert (plan["status"], plan["verdict"]) == ("fits", vram.ONE_AT_A_TIME)
    wanted = {"fallback": ["int8", "cpu"], "pinned": ["nomic-embed-text"], "reload": True}
    roles = ["ollama_server", "stt_server"]
    turns = filters.vram_plan_turns({"a": plan}, roles, "0.0.0.0:11500", wanted)
    need, int8 = plan["settings"]["speech_need_mib"], plan["settings"]["speech_int8_mib"]
    assert 0 < int8 < need
    assert turns == {
        "vram_policy": "yield",
        "vram_need_mib": need,
        "vram_kept_mib": 0,
        "vram_fallback": f"int8={int8},cpu",
        "ollama_url": "http://127.0.0.1:11500",
        "ollama_pinned": "nomic-embed-text",
        "ollama_reload": "true",
    }
    assert filters.vram_plan_turns({"a": plan}, ["stt_server"], "x", wanted)["ollama_url"] == ""
    assert filters.vram_plan_turns(filters.vram_plans(["a"], {"a": GPU}), roles, "x", wanted) == {}


def test_turns_with_speaches_are_carried_out_by_the_gateway_in_front_of_it() -> None:
    roles = ["base_system", "ollama_server", "stt_server", "voice_gateway"]
    tight = {
        **GPU,
        "instance_roles": roles,
        "gpu_vram_mib": 8192,
        "ollama_default_model": "llama3.1:8b",
        "ollama_context_length": 4096,
    }
    refused = request_.plan(tight)
    assert refused["status"] == "refused"
    assert "vram_policy: yield" in " ".join(refused["lines"])
    alone = request_.plan({**tight, "instance_roles": roles[:-1]})
    assert "vram_policy" not in " ".join(alone["lines"])
    for policy in vram.TURNS:
        plan = request_.plan({**tight, "vram_policy": policy})
        assert (plan["status"], plan["verdict"]) == ("fits", vram.ONE_AT_A_TIME)
        wanted = {"fallback": [], "pinned": [], "reload": False}
        turns = filters.vram_plan_turns({"a": plan}, roles, "127.0.0.1:11434", wanted)
        assert (turns["vram_policy"], turns["vram_need_mib"]) == (policy, plan["settings"]["speech_need_mib"])
        assert turns["vram_kept_mib"] == footprint.stt("large-v3-turbo", "float16").unloaded


def test_what_speaches_keeps_counts_beside_a_language_model_alone_on_the_card() -> None:
    mix = vram.Mix(24576, model="large-v3-turbo", llms=(vram.known_llm("qwen2.5:32b"),), policy="exclusive")
    kept = footprint.stt(mix.model, mix.compute_type).unloaded
    builtin = vram.fit(dataclasses.replace(mix, engine="builtin"))
    assert vram.fit(mix).one_mib - builtin.one_mib == kept > 0


BUILTIN = {**GPU, "stt_server_engine": "builtin", "ollama_default_model": "llama3.1:8b"}


def test_the_live_model_is_in_the_whole_plan() -> None:
    def planned(**more: Any) -> dict[str, Any]:
        return request_.plan({**BUILTIN, "gpu_vram_mib": 24576, **more})

    alone, both = planned(), planned(stt_server_live_model="small")
    weights = footprint.stt("small", "float16").parts["weights"]
    assert both["parts"][0]["name"] == "large-v3-turbo + small float16"
    assert both["parts"][0]["parts"]["live model"] == weights
    for key in ("rest_mib", "peak_mib"):
        # What vram_health measures drift against.
        assert both["units"]["voicegate"][key] == alone["units"]["voicegate"][key] + weights
    assert both["need_mib"] >= alone["need_mib"] + weights
    assert both["settings"]["speech_need_mib"] == alone["settings"]["speech_need_mib"] + weights
    assert both["settings"]["speech_int8_mib"] > alone["settings"]["speech_int8_mib"] > 0
    assert both["settings"]["fit_target_mib"] >= alone["settings"]["fit_target_mib"] + weights
    assert any("large-v3-turbo + small" in line for line in both["lines"])
    same = planned(stt_server_live_model="large-v3-turbo")
    assert same["parts"] == alone["parts"]


def test_a_live_model_can_be_what_is_too_much() -> None:
    enough = request_.plan({**BUILTIN, "gpu_vram_mib": 24576})["need_mib"]
    tight = {**BUILTIN, "gpu_vram_mib": enough}
    assert request_.plan(tight)["status"] == "fits"
    refused = request_.plan({**tight, "stt_server_live_model": "medium"})
    assert refused["status"] == "refused"
    assert 'stt_server_live_model: ""' in [near["change"] for near in refused["nearest"]]


@pytest.mark.parametrize(
    "names",
    [
        {"stt_server_live_model": "/srv/own"},
        {"stt_server_live_model": "tiny", "stt_server_model": "/srv/own"},
        {"stt_server_live_model": "/srv/own", "stt_server_model": "somebody/other"},
    ],
)
def test_where_one_of_the_speech_models_is_not_known_neither_is_counted(names: dict[str, str]) -> None:
    plan = request_.plan({**BUILTIN, "gpu_vram_mib": 24576, **names})
    assert plan["status"] == "unknown"
    assert len(plan["unknown"]) == 2
    assert [part["name"] for part in plan["parts"]] == ["llama3.1:8b", "nomic-embed-text"]
    assert plan["settings"]["speech_need_mib"] == 0


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"stt_server_live_model": "tiny"}, "stt_server_live_model: only the engine builtin"),
        (
            {"gpu_vram_mib": 8192, "stt_server_engine": "builtin", "stt_server_live_model": "auto"},
            "stt_server_live_model: 'auto' is no model",
        ),
        ({"gpu_vram_mib": "much"}, "gpu_vram_mib"),
        ({"gpu_card": "RTX 0"}, "RTX 0"),
        (
            {"gpu_vram_mib": 8192, "vram_policy": "yield"},
            "Add voice_gateway to the machine's roles",
        ),
        ({"vram_policy": "exclusive"}, "vram_policy: 'exclusive' needs to know how large the card is"),
        ({"gpu_vram_mib": 8192, "vram_policy": "turns"}, "vram_policy 'turns' is not one of"),
        (
            {
                "gpu_vram_mib": 8192,
                "vram_policy": "yield",
                "stt_server_engine": "builtin",
                "stt_server_model": "/srv/own",
            },
            "needs a speech model of known size",
        ),
        ({"gpu_vram_mib": 8192, "stt_server_model": "lrge"}, "stt_server_model"),
        ({"gpu_vram_mib": 8192, "ollama_context_length": "long"}, "ollama_context_length"),
        ({"gpu_vram_mib": 8192, "stt_server_quantization": "int3"}, "int3"),
    ],
)
def test_wrong_variables_are_named(wrong: dict[str, Any], text: str) -> None:
    lines = filters.vram_plan_refusals(filters.vram_plans(["x"], {"x": {**GPU, **wrong}}))
    assert lines[0] == "x:"
    assert text in lines[1]


def test_speech_on_the_cpu_takes_no_vram() -> None:
    plan = request_.plan({**GPU, "gpu_vram_mib": 8192, "stt_server_device": "cpu"})
    assert [part["name"] for part in plan["parts"]] == ["nomic-embed-text"]


def test_the_chart_is_svg_with_a_bar_for_each_card_whose_names_are_escaped() -> None:
    plan = request_.plan({**GPU, "gpu_vram_mib": 24576})
    text = _vram_chart.chart("a <b>", {"gpu-server": plan, "none": request_.plan(GPU)})
    svg = ET.fromstring(text)  # noqa: S314 - our own
    texts = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <b>"
    assert "gpu-server" in texts
    assert "none" not in texts
    widths = [float(node.attrib["width"]) for node in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert max(widths) <= _vram_chart.WIDTH


def test_docs_are_made_by_the_planner() -> None:
    assert vram_docs.page() == vram_docs.PAGE.read_text(encoding="utf-8"), (
        "run tests/support/vram_docs.py --write"
    )
