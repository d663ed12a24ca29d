// The chat page: streams answers from this server's own API and shows what /stats says.
// Text from the model only ever becomes text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const messages = []; // {role, content}
const history = []; // share found in memory, at most 60
const MOST_PARTS = 1000; // of one text; with more fences than that it is shown without blocks
let model = "";
let running = null; // AbortController of the answer being made
let before = null; // hits and misses of the poll before

// Talking to the server

let key = sessionStorage.getItem("conmoe-key") || "";

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForKey(Boolean(key));
    return ask(path, options);
  }
  return response;
}

let askingForKey = null;

function askForKey(wrong) {
  askingForKey ||= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-wrong").hidden = !wrong;
    $("key").value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      key = $("key").value.trim();
      sessionStorage.setItem("conmoe-key", key);
      askingForKey = null;
      resolve();
    }, { once: true });
  });
  return askingForKey;
}

async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done || signal.aborted) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

// The conversation

function show(role, text) {
  const item = document.createElement("li");
  item.className = role === "user" ? "mine" : "answer";
  const body = document.createElement("div");
  body.className = "text";
  body.dir = "auto"; // text from right to left too
  item.append(body);
  $("messages").append(item);
  $("welcome").hidden = true;
  render(body, text);
  return item;
}

// Fenced code becomes <pre>; everything else stays as it is. The text only grows, and of what is there
// only the last part changes, so a long answer is not drawn anew for every word.
function render(body, text) {
  const parts = text.split("```", MOST_PARTS);
  const shown = parts.length < MOST_PARTS ? parts : [text];
  if (body.childNodes.length > shown.length) body.replaceChildren();
  for (let index = Math.max(0, body.childNodes.length - 1); index < shown.length; index++) {
    const node = body.childNodes[index]
      || body.appendChild(index % 2 ? document.createElement("pre") : document.createTextNode(""));
    const part = index % 2 ? shown[index].replace(/^[\w+-]*\n/, "").replace(/\n$/, "") : shown[index];
    if (node.textContent !== part) node.textContent = part;
  }
}

function under(item, words, problem) {
  const line = document.createElement("div");
  line.className = problem ? "under problem" : "under";
  if (problem) line.setAttribute("role", "alert");
  for (const word of words) {
    const span = document.createElement("span");
    span.textContent = word;
    line.append(span);
  }
  item.append(line);
}

// A model's reasoning stands folded above its answer, and is not sent back.
function showReasoning(item) {
  const fold = document.createElement("details");
  const name = document.createElement("summary");
  const body = document.createElement("div");
  fold.className = "reasoning";
  name.textContent = "Reasoning";
  body.className = "thoughts";
  body.dir = "auto";
  fold.append(name, body);
  item.prepend(fold);
  return body;
}

function followsEnd() {
  const chat = $("chat");
  return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
}

function toEnd() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

function body() {
  const system = $("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  const value = { model, messages: [...first, ...messages], stream: true, stream_options: { include_usage: true } };
  const temperature = Number($("temperature").value);
  if (temperature >= 0) value.temperature = temperature;
  const most = parseInt($("max-tokens").value, 10);
  if (most > 0) value.max_tokens = most;
  // Half of a surrogate pair is no text, and the server would refuse the whole conversation for it.
  return JSON.stringify(value, (_, one) => (one?.toWellFormed ? one.toWellFormed() : one));
}

async function answer(question) {
  messages.push({ role: "user", content: question });
  show("user", question);
  const item = show("assistant", "");
  const target = item.firstElementChild;
  item.classList.add("busy");
  toEnd();
  setRunning(new AbortController());
  const { signal } = running;
  const start = performance.now();
  let thoughts = null, text = "", first = 0, usage = null, finish = "", problem = "", pending = false;
  const draw = () => {
    pending = false;
    const follow = followsEnd();
    render(target, text);
    if (follow) toEnd();
  };
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: body(), signal,
    });
    if (!response.ok) {
      problem = await reason(response);
    } else {
      for await (const event of events(response, signal)) {
        if (event.error) { problem = event.error.message; break; }
        usage = event.usage || usage;
        const choice = event.choices[0];
        if (!choice) continue;
        finish = choice.finish_reason || finish;
        if (choice.delta.reasoning_content) {
          first ||= performance.now();
          thoughts ||= showReasoning(item);
          thoughts.append(choice.delta.reasoning_content);
        }
        if (!choice.delta.content) continue;
        first ||= performance.now();
        text += choice.delta.content;
        if (!pending) { pending = true; requestAnimationFrame(draw); }
      }
      if (!finish && !problem && !signal.aborted) problem = "The connection ended before the answer did.";
    }
  } catch (error) {
    if (!signal.aborted) problem = "The server cannot be reached.";
  }
  draw();
  item.classList.remove("busy");
  finished(item, { text, usage, finish, problem, stopped: signal.aborted, start, first });
  setRunning(null);
}

async function reason(response) {
  try {
    const { error } = await response.json();
    return error.code === "context_length_exceeded"
      ? "This conversation is as long as the model can hold. “New chat” starts another."
      : error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function finished(item, { text, usage, finish, problem, stopped, start, first }) {
  const words = [];
  if (usage) {
    const after = (performance.now() - first) / 1000;
    words.push(`${usage.completion_tokens} tokens`);
    if (usage.completion_tokens > 1 && after > 0) {
      words.push(`${((usage.completion_tokens - 1) / after).toFixed(1)} tokens/s`);
    }
  }
  if (first) {
    const wait = `first token ${((first - start) / 1000).toFixed(1)} s`;
    words.push(wait);
    $("first-token").textContent = wait;
  }
  if (stopped) words.push("stopped");
  if (finish === "length") words.push("ended at the longest answer");
  if (words.length) under(item, words, false);
  if (problem) under(item, [problem], true);
  if (text) messages.push({ role: "assistant", content: text });
  else {
    const { content } = messages.pop(); // a question without an answer is not kept
    if (problem && !$("question").value) { $("question").value = content; grow(); }
    if (!problem && !stopped) under(item, ["an empty answer"], false);
  }
  if (followsEnd()) toEnd();
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (!controller) $("question").focus({ preventScroll: true });
  poll(true);
}

function stop() {
  if (running) running.abort();
}

function startAnew() {
  stop();
  messages.length = 0;
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  $("question").focus();
}

// The figures

const MIB = 1 << 20, GIB = 1 << 30;

function size(bytes, unit) {
  return unit === GIB ? (bytes / GIB).toFixed(2) : Math.round(bytes / MIB).toLocaleString("en");
}

function bytes(value) {
  if (value >= GIB) return `${(value / GIB).toFixed(2)} GiB`;
  return value >= MIB ? `${(value / MIB).toFixed(1)} MiB` : `${Math.round(value / 1024)} KiB`;
}

const STATES = { ready: "ready", loading: "loading the model …", stopping: "stopping", failed: "failed" };

function figures(stats) {
  model = stats.model;
  $("model").textContent = stats.model;
  document.title = `${stats.model} · conmoe-edge`;
  setState(stats.state, STATES[stats.state] || stats.state);
  if (stats.running) $("speed").textContent = stats.tokens_per_second.toFixed(1);
  const others = stats.queued ? `, ${stats.queued} waiting` : "";
  $("now").textContent = `${stats.running} of ${stats.parallel} answers being made${others}; `
    + `${stats.totals.completion_tokens.toLocaleString("en")} tokens written since the start`;
  if (stats.memory) memoryFigure(stats.memory);
  if (stats.compute) {
    const path = stats.compute.fast_path ? `; fast path: ${stats.compute.fast_path.summary}` : "";
    $("compute-note").textContent = `kernel: ${stats.compute.kernel}${path}`;
  }
  if (stats.cache) cacheFigure(stats.cache);
}

function memoryFigure(memory) {
  const limit = memory.budget;
  const unit = (limit || memory.used) >= GIB ? GIB : MIB;
  const name = unit === GIB ? "GiB" : "MiB";
  $("memory").textContent = size(memory.used, unit);
  $("memory-of").textContent = limit ? `of ${size(limit, unit)} ${name}` : name;
  $("memory-bar").hidden = !limit;
  if (limit) {
    const share = Math.min(1, memory.used / limit);
    $("memory-bar").firstElementChild.style.width = `${100 * share}%`;
    $("memory-bar").dataset.full = String(memory.used > limit);
  }
  const place = memory.device.startsWith("cuda") ? "GPU" : "RAM";
  const held = memory.conversations ? bytes(memory.conversations) : "none";
  $("memory-note").textContent = `${place}; conversations hold ${held} of their ${bytes(memory.conversations_planned)}`;
}

function cacheFigure(cache) {
  if (!cache.prototypes) {
    $("hits").textContent = "all";
    $("spark").hidden = true;
    $("cache-note").textContent = "this model was left whole";
    return;
  }
  if (before) {
    const hits = cache.hits - before.hits, misses = cache.misses - before.misses;
    if (hits + misses > 0) {
      history.push(hits / (hits + misses));
      if (history.length > 60) history.shift();
      $("hits").textContent = `${(100 * history[history.length - 1]).toFixed(0)} %`;
      $("hits-of").textContent = "lately";
    }
  }
  before = { hits: cache.hits, misses: cache.misses };
  const step = 120 / 59;
  const points = history.map((share, i) => `${((60 - history.length + i) * step).toFixed(1)},${(35 - 34 * share).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
  const read = cache.disk_bytes + cache.host_bytes;
  const share = Math.round(100 * cache.resident / cache.prototypes);
  $("cache-note").textContent = `${cache.resident} of ${cache.prototypes} fit at once (${share} %); `
    + `${bytes(read)} read since the start`;
}

function setState(state, text) {
  $("state").dataset.state = state;
  $("state").textContent = text;
  $("send").disabled = state !== "ready";
}

let timer = 0;

async function poll(soon) {
  clearTimeout(timer);
  if (soon) { timer = setTimeout(poll, 50); return; }
  try {
    const response = await ask("stats");
    if (response.ok) figures(await response.json());
  } catch {
    setState("gone", "the server does not answer");
  }
  timer = setTimeout(poll, document.hidden ? 10000 : running || !model ? 1000 : 3000);
}

// Controls

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function send() {
  const text = $("question").value.trim();
  if (!text || running || $("send").disabled) return;
  $("question").value = "";
  grow();
  answer(text);
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(true); });
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", startAnew);
$("ideas").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  $("question").value = event.target.textContent;
  send();
});
$("figures-toggle").addEventListener("click", () => {
  const open = $("figures").classList.toggle("open");
  $("figures-toggle").setAttribute("aria-expanded", String(open));
});
$("temperature").addEventListener("input", () => {
  const value = Number($("temperature").value);
  $("temperature-value").textContent = value < 0 ? "model’s own" : value === 0 ? "0 (greedy)" : value.toFixed(1);
});
poll();
