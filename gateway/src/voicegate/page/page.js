"use strict";
// Drop a file; the text comes as a stream of events, each with the times of its words.
// Speak; the words come while you do, and then the recording is treated like a file.
const $ = (id) => document.getElementById(id);
const LANGUAGES = ["ar", "de", "en", "es", "fr", "he", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "tr", "uk", "zh"];
let file = null, words = [], stopper = null, recorder = null, address = "";

const names = new Intl.DisplayNames(undefined, { type: "language" });
for (const code of LANGUAGES) $("language").append(new Option(names.of(code), code));

function say(text, bad = false) {
  $("say").textContent = text;
  $("say").className = bad ? "bad" : "";
}

async function ask(path, fields, signal) {
  const body = new FormData();
  // The fields first: the server can then refuse before the file has come.
  for (const [name, value] of Object.entries(fields)) if (value) body.append(name, value);
  body.append("file", file, file.name);
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { method: "POST", body, headers, signal });
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  const found = await answer.json().catch(() => null);
  throw new Error(found?.error?.message ?? `The server answered ${answer.status}.`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

function show(event) {
  const box = $("text");
  for (const word of event.words ?? []) {
    const span = document.createElement("span");
    span.textContent = word.word;
    span.addEventListener("click", () => { $("audio").currentTime = word.start; $("audio").play(); });
    words.push({ ...word, span });
    // Scripts without spaces between words are shown without.
    if (box.childNodes.length && /\s/.test(event.delta.trim())) box.append(" ");
    else if (box.childNodes.length && /^\s/.test(event.delta)) box.append(" ");
    box.append(span);
  }
  if (!event.words?.length) box.append(event.delta);
  const length = $("audio").duration;
  if (Number.isFinite(length) && length > 0) $("progress").value = Math.min(1, event.end / length);
}

async function transcribe(chosen) {
  stopper?.abort();
  const mine = stopper = new AbortController();
  file = chosen;
  words = [];
  $("text").replaceChildren();
  $("take").hidden = true;
  $("result").hidden = false;
  $("stop").disabled = false;
  $("progress").removeAttribute("value");
  $("name").textContent = file.name;
  if (address) URL.revokeObjectURL(address);
  $("audio").src = address = URL.createObjectURL(file);
  say("Listening to it…");
  let whole = false;
  try {
    const fields = { stream: "true", "timestamp_granularities[]": "word", language: $("language").value };
    for await (const event of events(await ask("/v1/audio/transcriptions", fields, mine.signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "transcript.text.delta") show(event);
      if (event.type === "transcript.text.done") whole = true;
    }
    if (!whole) throw new Error("The connection ended before the text did.");
    $("take").hidden = !$("text").textContent;
    say($("text").textContent ? "Done." : "Nobody speaks in it.");
  } catch (error) {
    if (mine !== stopper) return; // another file has taken its place
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  if (mine !== stopper) return;
  $("progress").value = whole ? 1 : 0;
  $("stop").disabled = true;
}

async function take(button) {
  const kind = button.dataset.kind;
  button.disabled = true;
  try {
    const content = kind === "txt" ? $("text").textContent + "\n"
      : await (await ask("/v1/audio/subtitles", { response_format: kind, language: $("language").value })).text();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
    link.download = `${file.name.replace(/\.[^.]*$/, "")}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved as ${link.download}.`);
  } catch (error) {
    say(error.message, true);
  }
  button.disabled = false;
}

// A live session beside the recording; where it cannot be had, the words come at the end only.
function listen(kind) {
  const form = kind.includes("webm") ? "webm" : "ogg";
  const key = sessionStorage.getItem("key");
  const query = new URLSearchParams({ format: form, partials: "0.5", language: $("language").value });
  const protocols = ["voicegate", ...(key ? [`openai-insecure-api-key.${key}`] : [])];
  const socket = new WebSocket(`${location.origin.replace(/^http/, "ws")}/ws/transcribe?${query}`, protocols);
  const early = [], said = [];
  socket.addEventListener("open", () => early.splice(0).forEach((piece) => socket.send(piece)));
  socket.addEventListener("message", ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "final") said.push(message.text);
    if (message.type !== "final" && message.type !== "partial") return;
    const now = message.type === "partial" ? message.text : "";
    $("live").hidden = false;
    $("sure").textContent = said.concat(now.slice(0, message.stable)).join(" ").trim() + " ";
    $("unsure").textContent = now.slice(message.stable ?? 0).trim();
  });
  const send = (piece) => (socket.readyState === WebSocket.CONNECTING ? early.push(piece)
    : socket.readyState === WebSocket.OPEN && socket.send(piece));
  return {
    send,
    end() {
      send(JSON.stringify({ type: "end" }));
      $("live").hidden = true;
      $("sure").textContent = $("unsure").textContent = "";
      socket.close(1000); // nobody comes back to this session
    },
  };
}

async function record() {
  if (recorder) return recorder.stop();
  let stream;
  try {
    if (!navigator.mediaDevices) throw new Error("Browsers give the microphone to https and localhost only.");
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    return say(`The microphone cannot be used: ${error.message}`, true);
  }
  const pieces = [];
  const kinds = ["audio/webm;codecs=opus", "audio/ogg;codecs=opus"].filter((kind) => MediaRecorder.isTypeSupported(kind));
  recorder = new MediaRecorder(stream, kinds.length ? { mimeType: kinds[0] } : {});
  const hearer = kinds.length ? listen(kinds[0]) : null; // what Safari records cannot be read before it is whole
  recorder.addEventListener("dataavailable", (event) => {
    pieces.push(event.data);
    hearer?.send(event.data);
  });
  recorder.addEventListener("stop", () => {
    stream.getTracks().forEach((track) => track.stop());
    const kind = recorder.mimeType;
    recorder = null;
    hearer?.end();
    $("record").textContent = "Speak";
    $("record").setAttribute("aria-pressed", "false");
    transcribe(new File(pieces, `recording.${kind.includes("mp4") ? "mp4" : "webm"}`, { type: kind }));
  });
  recorder.start(250); // milliseconds in a piece
  $("record").textContent = "Stop and transcribe";
  $("record").setAttribute("aria-pressed", "true");
  say("Speak now.");
}

function light() {
  const now = $("audio").currentTime;
  for (const word of words) word.span.classList.toggle("lit", word.start <= now && now < word.end);
  if (!$("audio").paused) requestAnimationFrame(light);
}

$("audio").addEventListener("play", light);
$("audio").addEventListener("seeked", light);
$("file").addEventListener("change", () => {
  if ($("file").files[0]) transcribe($("file").files[0]);
  $("file").value = "";
});
$("record").addEventListener("click", record);
$("stop").addEventListener("click", () => stopper?.abort());
$("take").addEventListener("click", (event) => { if (event.target.dataset.kind) take(event.target); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  if (file) transcribe(file);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) transcribe(event.dataTransfer.files[0]);
  });
}
