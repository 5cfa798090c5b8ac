"""Peace on the card: what to do when the speech model and Ollama's models want the same VRAM.

`decide` is a pure function of what is known. `Peace` carries its steps out, before the engine loads, and
looks after Ollama's models that did not find room. Every decision is one line in the log, with its numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from voicegate import card, errors
from voicegate.errors import ApiError
from voicegate.fallback import Fallback, fallbacks
from voicegate.logs import event
from voicegate.ollama import Loaded, Ollama, OllamaError
from voicegate.settings import Settings

PAUSE = 0.5  # seconds between two looks while waiting
LAST = 10  # times its patience waits a request that has no other way
AT_ONCE = 0.05  # seconds until the next look after a model was asked to go
WATCH = 5.0  # seconds between two looks at Ollama's models
# Seconds that memory needs to be free again after a model was let go: a process has to end.
SETTLE = 3.0

Kind = Literal["proceed", "unload", "wait", "fall_back", "try", "refuse"]


@dataclass(frozen=True)
class Situation:
    policy: str
    free_mib: int | None  # None: not known
    need_mib: int
    reserve_mib: int
    models: Sequence[Loaded]  # Ollama's, with memory on the card
    waited: float  # seconds since the first look
    patience: float  # seconds
    pinned: frozenset[str] = frozenset()
    asked_to_go: frozenset[str] = frozenset()
    fallbacks: Sequence[Fallback] = ()

    def fits(self, need_mib: int) -> bool:
        return self.free_mib is None or self.free_mib - self.reserve_mib >= need_mib


@dataclass(frozen=True)
class Step:
    kind: Kind
    models: tuple[str, ...] = ()  # of unload
    fallback: Fallback | None = None


def movable(model: Loaded, pinned: frozenset[str]) -> bool:
    """Whether a model may be asked to go: not one that a person pinned, by name or with keep_alive -1."""
    names = {model.name, model.name.removesuffix(":latest")}
    return not math.isinf(model.remaining) and not names & pinned


def decide(now: Situation) -> Step:
    """The next step before the speech model is loaded.

    exclusive: nobody else is on the card, whether there would be room or not. yield: only as many idle
    models are let go as it takes, the fewest and of those the smallest. resident: nobody is moved; what is
    missing is waited for, since it was planned to be there. When patience ends: a fallback if one is allowed
    and fits; else an attempt all the same, since a plan errs on the safe side, but not next to a model that
    exclusive forbids.
    """
    others = [model for model in now.models if model.vram_mib > 0]
    crowded = now.policy == "exclusive" and bool(others)
    if now.fits(now.need_mib) and not crowded:
        return Step("proceed")
    if now.policy != "resident":
        idle = [
            model
            for model in others
            if movable(model, now.pinned) and not model.busy and model.name not in now.asked_to_go
        ]
        missing = now.need_mib + now.reserve_mib - (now.free_mib or 0)
        going = idle if crowded else fewest(idle, missing)
        if going:
            return Step("unload", tuple(model.name for model in going))
    leaving = any(model.busy or model.name in now.asked_to_go for model in others)
    hopeless = crowded and not leaving
    if now.waited < now.patience and not hopeless:
        return Step("wait")
    for fallback in now.fallbacks:
        if not fallback.need_mib or (now.fits(fallback.need_mib) and not crowded):
            return Step("fall_back", fallback=fallback)
    if not crowded:
        return Step("try")
    return Step("refuse" if hopeless or now.waited >= LAST * now.patience else "wait")


def fewest(idle: Sequence[Loaded], missing_mib: int) -> list[Loaded]:
    """As few models as give so much, the smallest that will do; all of them if even that is too little."""
    rest = sorted(idle, key=lambda model: (model.vram_mib, model.name))
    chosen: list[Loaded] = []
    while rest and missing_mib > 0:
        enough = [model for model in rest if model.vram_mib >= missing_mib]
        taken = enough[0] if enough else rest[-1]
        rest.remove(taken)
        chosen.append(taken)
        missing_mib -= taken.vram_mib
    return chosen


class Tenant(Protocol):
    """The engine, as far as peace is concerned."""

    def idle(self) -> bool: ...

    async def on_card(self) -> bool: ...

    async def unload(self) -> None: ...

    async def start(self) -> None: ...


@dataclass
class Peace:
    """For one engine. Counters are for metrics: decisions by kind, evictions and repairs by model."""

    settings: Settings
    ollama: Ollama | None
    read_card: Callable[[int], card.Card | None] = card.read
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    decisions: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    fallen_back: Fallback | None = None
    _evicted: dict[str, tuple[float, float]] = field(default_factory=dict)  # when, for how long it had stayed
    _seen: set[tuple[str, int]] = field(default_factory=set)
    _watching: asyncio.Task[None] | None = None
    _told: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Peace | None:
        """None where nothing is planned: without a footprint there is nothing to hold against the card."""
        if not settings.vram_need_mib or settings.device == "cpu":
            return None
        return cls(settings, Ollama(settings.ollama_url) if settings.ollama_url else None)

    # -- before loading

    async def before_load(self, there_mib: int = 0) -> Settings:
        """Make room, and say with which settings to load. ApiError (503, Retry-After) if it must not be.

        `there_mib`: what of the need the engine has on the card already.
        """
        started = self.clock()
        asked: set[str] = set()
        asked_at = started
        while True:
            models = await self._models()
            now = Situation(
                policy=self.settings.vram_policy,
                free_mib=await self._free(),
                need_mib=max(0, self.settings.vram_need_mib - there_mib),
                reserve_mib=self.settings.vram_reserve_mib,
                models=models,
                waited=self.clock() - started,
                patience=self.settings.vram_wait,
                pinned=self._pinned(),
                # Who did not go in a while is asked again.
                asked_to_go=frozenset(asked) if self.clock() - asked_at < SETTLE else frozenset(),
                fallbacks=fallbacks(self.settings.vram_fallback),
            )
            step = decide(now)
            self._note(step, now)
            if step.kind == "unload":
                asked |= await self._unload([model for model in models if model.name in step.models])
                asked_at = self.clock()
            elif step.kind == "fall_back" and step.fallback is not None:
                self.fallen_back = step.fallback
                return smaller(self.settings, step.fallback)
            elif step.kind == "refuse":
                raise errors.vram_busy([model.name for model in models])
            elif step.kind != "wait":
                self.fallen_back = None
                return self.settings
            await self.sleep(AT_ONCE if step.kind == "unload" else PAUSE)

    async def _unload(self, models: Sequence[Loaded]) -> set[str]:
        gone = set()
        for model in models:
            try:
                await self._asked().unload(model.name)
            except OllamaError as error:
                event("ollama_failed", level=logging.WARNING, error=str(error))
            else:
                self.evictions[model.name] += 1
                self._evicted[model.name] = (self.clock(), model.remaining)
            gone.add(model.name)
        return gone

    def _note(self, step: Step, now: Situation) -> None:
        words = f"{step.kind} {step.models} {step.fallback}"
        if step.kind == "wait" and self._told == words:
            return  # once, not at every look
        self._told = words
        self.decisions[step.kind] += 1
        event(
            "vram", level=logging.INFO if step.kind in ("proceed", "unload") else logging.WARNING,
            step=step.kind, policy=now.policy, free_mib=now.free_mib, need_mib=now.need_mib,
            reserve_mib=now.reserve_mib, waited=round(now.waited, 1), unload=",".join(step.models),
            fallback=step.fallback.name if step.fallback else "",
            ollama=",".join(f"{model.name}={model.vram_mib}" for model in now.models),
        )  # fmt: skip

    # -- beside it

    def watch(self, tenant: Tenant) -> None:
        """Look after Ollama's models, and after a fallback, until `stop`."""
        self._watching = asyncio.create_task(self._watch(tenant))

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        if self.ollama is not None:
            await self.ollama.close()

    async def _watch(self, tenant: Tenant) -> None:
        while True:
            await self.sleep(WATCH)
            try:
                await self.look(tenant)
            except (OllamaError, ApiError) as error:
                event("ollama_failed", level=logging.DEBUG, error=str(error))

    async def look(self, tenant: Tenant) -> None:
        """One look: models of Ollama that have layers on the CPU, and whether a fallback is still needed."""
        models = await self._models()
        for model in models:
            key = (model.name, model.vram_mib)
            # The same model in the same state is mended or told of once.
            if not model.on_cpu_mib or key in self._seen:
                continue
            turns = self.settings.vram_policy != "resident"
            if turns and (model.busy or not tenant.idle()):
                continue  # its turn comes when nobody is at work
            self._seen.add(key)
            event(
                "ollama_on_cpu", level=logging.WARNING, model=model.name, vram_mib=model.vram_mib,
                on_cpu_mib=model.on_cpu_mib, policy=self.settings.vram_policy,
            )  # fmt: skip
            if turns:
                await self._mend(model, tenant)
        names = {model.name for model in models}
        self._seen = {key for key in self._seen if key[0] in names}
        await self._return(tenant)
        # Not while it makes room for itself.
        if self.settings.ollama_reload and tenant.idle() and not await tenant.on_card():
            await self._reload(names)

    async def _mend(self, model: Loaded, tenant: Tenant) -> None:
        """Make room for a model that did not find enough, and have it loaded again."""
        free, there = await self._free(), await tenant.on_card()
        gives = self.settings.vram_need_mib - self.settings.vram_kept_mib if there else 0
        room = math.inf if free is None else free + gives
        if not movable(model, self._pinned()) or room < model.on_cpu_mib:
            return  # pinned, or it would not help
        if there:
            await tenant.unload()
            if await tenant.on_card():  # somebody came in between: at the next look
                self._seen.discard((model.name, model.vram_mib))
                return
        ollama = self._asked()
        await ollama.unload(model.name)
        deadline = self.clock() + SETTLE
        while any(one.name == model.name for one in await ollama.loaded()) and self.clock() < deadline:
            await self.sleep(PAUSE)
        await ollama.load(model.name, model.remaining)
        after = next((one for one in await ollama.loaded() if one.name == model.name), None)
        mended = after is not None and not after.on_cpu_mib
        if mended:
            self.repairs[model.name] += 1
        elif after is not None:
            self._seen.add((after.name, after.vram_mib))
        event(
            "ollama_mended" if mended else "ollama_still_on_cpu", model=model.name,
            level=logging.INFO if mended else logging.WARNING,
            vram_mib=after.vram_mib if after else 0, on_cpu_mib=after.on_cpu_mib if after else 0,
        )  # fmt: skip

    async def _return(self, tenant: Tenant) -> None:
        """From a fallback to what was asked for, once there is room and nobody waits for an answer."""
        free = await self._free()
        back = self.fallen_back
        if back is None or free is None or not tenant.idle():
            return
        have = free + (back.need_mib if await tenant.on_card() else 0)
        if have - self.settings.vram_reserve_mib < self.settings.vram_need_mib:
            return
        self.fallen_back = None
        event("vram_back", free_mib=free, need_mib=self.settings.vram_need_mib, fallback=back.name)
        await tenant.unload()
        if self.settings.ttl < 0:
            await tenant.start()

    async def _reload(self, there: set[str]) -> None:
        """Take back what was let go for the speech model, if it would still be there."""
        for name, (when, remaining) in list(self._evicted.items()):
            del self._evicted[name]
            left = remaining - (self.clock() - when)
            if name not in there and left > 0:
                event("ollama_reload", model=name, remaining=round(left) if math.isfinite(left) else -1)
                await self._asked().load(name, left)

    async def _models(self) -> list[Loaded]:
        """Without an answer of Ollama there is nobody to make room; the card's free memory still decides."""
        if self.ollama is None:
            return []
        try:
            return await self.ollama.loaded()
        except OllamaError as error:
            event("ollama_failed", level=logging.DEBUG, error=str(error))
            return []

    async def _free(self) -> int | None:
        found = await asyncio.to_thread(self.read_card, self.settings.device_index)
        return found.free_mib if found else None

    def _pinned(self) -> frozenset[str]:
        return frozenset(name.strip() for name in self.settings.ollama_pinned.split(",") if name.strip())

    def _asked(self) -> Ollama:
        if self.ollama is None:
            raise OllamaError("no Ollama is configured")
        return self.ollama


def smaller(settings: Settings, fallback: Fallback) -> Settings:
    if fallback.name == "cpu":
        return replace(settings, device="cpu", compute_type="int8")
    return replace(settings, compute_type=fallback.name)


def counted(peace: Peace | None) -> Mapping[str, Mapping[str, int]]:
    """For metrics and status."""
    if peace is None:
        return {}
    return {"decisions": peace.decisions, "evictions": peace.evictions, "repairs": peace.repairs}
