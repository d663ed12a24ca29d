// The chat page: answers from this server's own API, and what /stats says about them.

import { copy } from "./clipboard.js";
import { add, beside, goTo, messages, newConversation, path, remove } from "./conversation.js";
import { keep, reopen, startList } from "./conversation_list.js";
import { figures, pieceCame, speedBegins, speedOver } from "./figures.js";
import { leaveOut, more } from "./room.js";
import { ask, events, Failure, failureOf, post } from "./server.js";
import { dropsWhenFull, startSettings, systemText, wishes } from "./settings.js";
import { AnswerItem, drawActions, drawAll, editQuestion, leftOutText } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const MOST_TRIES = 10; // while the server is busy
const SHORTEST = 0.05; // seconds over which a speed means something
const OPENED = "conmoe-opened"; // the conversation of this tab

let conversation = newConversation();
let running = null; // {stop: AbortController, now: function that ends a wait, or null}
let model = "";
let context = 0;

// Asking

async function answerTo(parent, leastOut = 0) {
  const talk = conversation; // another one may be opened meanwhile
  const before = path(talk, parent);
  const node = add(talk, { role: "assistant", model: $("models").value || model }, parent);
  const item = new AnswerItem(node);
  running = { stop: new AbortController(), now: null };
  show({ live: item });
  controls();
  keep(talk);
  $("spoken").textContent = "Answering.";
  speedBegins();
  const { signal } = running.stop;
  const clock = { start: performance.now(), first: 0 };
  const draw = paced(() => item.show());
  try {
    const response = await answered(before, node, item, leastOut);
    node.ignored = response.headers.get("X-Conmoe-Ignored") || undefined;
    for await (const event of events(response, signal)) take(event, node, clock, draw);
    if (!node.finish && !signal.aborted) throw new Failure("lost", "The connection ended before the answer did.");
  } catch (error) {
    if (!signal.aborted) node.problem = problemOf(error, node);
  }
  if (signal.aborted) node.stopped = true;
  over(node, clock);
  running = null;
  if (talk === conversation) {
    const follow = followsEnd();
    item.finish();
    show({ follow });
    $("question").focus({ preventScroll: true });
  }
  controls();
  await keep(talk);
}

/** The response that streams; waits while the server is busy, and leaves out old turns while it is full. */
async function answered(before, node, item, leastOut) {
  const wanted = wishes(), text = systemText(), { signal } = running.stop;
  node.most = wanted.max_tokens;
  const first = text ? [{ role: "system", content: text }] : [];
  const sent = messages(before);
  const said = before.findLast((turn) => turn.role === "assistant")?.leftOut || 0;
  let already = Math.max(said, leastOut);
  if (dropsWhenFull()) {
    already = await leaveOut({ sent, first, already, context, most: wanted.max_tokens, model: node.model, signal });
  }
  for (let tries = 1; ; tries++) {
    tellLeftOut(node, item, already, said);
    const body = {
      model: node.model, messages: [...first, ...sent.slice(already)], stream: true,
      stream_options: { include_usage: true }, ...wanted,
    };
    const response = await post("v1/chat/completions", body, signal);
    if (response.ok) return response;
    const failed = await failureOf(response);
    if (failed.kind === "full" && dropsWhenFull()) already = more(sent, already);
    else if (failed.kind === "busy" && tries < MOST_TRIES) await pause(item, failed, signal);
    else throw failed;
  }
}

function tellLeftOut(node, item, already, said) {
  if (!already) return;
  node.leftOut = already;
  node.leftOutNow = already > said;
  item.item.querySelector(".left-out")?.remove();
  if (node.leftOutNow) item.note(leftOutText(node));
}

async function pause(item, failed, signal) {
  try {
    for (let left = Math.ceil(failed.wait); left > 0; left--) {
      const follow = followsEnd();
      item.wait(`${failed.message} Trying again in ${left} s.`);
      if (follow) toEnd();
      const early = await new Promise((resolve, reject) => {
        const timer = setTimeout(resolve, 1000, false);
        running.now = () => { clearTimeout(timer); resolve(true); };
        signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
      });
      if (early) break;
    }
  } finally {
    running.now = null;
    item.waited();
  }
}

function take(event, node, clock, draw) {
  node.usage = event.usage || node.usage;
  const choice = event.choices[0];
  if (!choice) return;
  node.finish = choice.finish_reason || node.finish;
  const { reasoning_content: thought, content, tool_calls: calls } = choice.delta;
  if (!thought && !content && !calls) return;
  clock.first ||= performance.now();
  pieceCame();
  if (thought) node.reasoning = (node.reasoning || "") + thought;
  else if (node.reasoning) node.thoughtFor ??= (performance.now() - clock.first) / 1000;
  if (content) node.content += content;
  for (const call of calls || []) takeCall(node, call);
  draw();
}

/** A call comes whole, or its arguments in pieces by its `index`. */
function takeCall(node, { index, id, function: { name, arguments: given } }) {
  node.calls ||= [];
  const there = node.calls[index];
  if (there) there.arguments += given || "";
  else node.calls[index] = { id, name: name || "", arguments: given || "" };
}

/** `draw` with the screen, and less often than that where it takes long. */
function paced(draw) {
  let pending = false, notBefore = 0;
  const now = () => {
    pending = false;
    const start = performance.now(), follow = followsEnd();
    draw();
    if (follow) toEnd();
    notBefore = performance.now() + 4 * (performance.now() - start);
  };
  return () => {
    if (pending) return;
    pending = true;
    const wait = notBefore - performance.now();
    if (wait > 0) setTimeout(now, wait);
    else requestAnimationFrame(now);
  };
}

function problemOf(error, node) {
  if (!(error instanceof Failure)) {
    console.error(error);
    return { kind: "refused", text: `The page failed: ${error.message}` };
  }
  const kept = node.content || node.reasoning ? "What came until then is kept above." : "";
  const hint = { gone: "Retry once `conmoe-edge serve` runs again.", lost: kept }[error.kind] || "";
  const full = "Nothing was cut. In the settings, “When the context is full” can leave out the oldest turns by itself.";
  return { kind: error.kind, text: error.message, hint: error.kind === "full" ? full : hint };
}

function over(node, clock) {
  const after = (performance.now() - clock.first) / 1000;
  if (clock.first) node.firstAfter = (clock.first - clock.start) / 1000;
  if (node.reasoning) node.thoughtFor ??= after;
  if (node.usage?.completion_tokens > 1 && after > SHORTEST) node.perSecond = (node.usage.completion_tokens - 1) / after;
  speedOver(node.perSecond || 0, clock.first ? `first token ${node.firstAfter.toFixed(1)} s` : "no answer");
  const said = node.content.slice(0, 300);
  $("spoken").textContent = node.problem ? "" : `Answer: ${said}${node.content.length > 300 ? " … and more." : ""}`;
}

// What is shown

/** Draw what changed; `live` is the item of the answer that begins. */
function show({ follow = true, live = null } = {}) {
  const turns = path(conversation);
  drawAll(conversation, turns, Boolean(running), live);
  $("welcome").hidden = turns.length > 0;
  if (follow) toEnd();
}

function followsEnd() {
  const chat = $("chat");
  return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
}

function toEnd() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

function open(other) {
  stop();
  conversation = other;
  sessionStorage.setItem(OPENED, other.id);
  show();
  closeDrawers();
}

function startAnew() {
  stop();
  conversation = newConversation();
  sessionStorage.removeItem(OPENED);
  for (const one of document.querySelectorAll("#conversations [aria-current]")) one.removeAttribute("aria-current");
  show();
  closeDrawers();
  $("question").focus();
}

function controls() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  poll(true);
}

function stop() {
  running?.stop.abort();
}

// What can be done with a turn

function retry(turn, leastOut = 0) {
  const { parent } = turn;
  const nothing = !turn.content && !turn.reasoning && !turn.calls?.length;
  if (nothing && !Object.values(conversation.nodes).some((one) => one.parent === turn.id)) remove(conversation, turn);
  answerTo(parent, leastOut);
}

function retryShorter(turn) {
  const sent = messages(path(conversation, turn.parent));
  try {
    retry(turn, more(sent, turn.leftOut || 0));
  } catch (error) {
    $("messages").querySelector(`[data-turn="${turn.id}"]`).remove(); // it is drawn anew
    turn.problem = problemOf(error, turn);
    show();
  }
}

const ACTIONS = {
  retry,
  "retry-shorter": retryShorter,
  new: startAnew,
  "try-now": () => running?.now?.(),
  copy: (turn, button) => copy(turn.content, button),
  edit: (turn, button) => editQuestion(button.closest("li"), turn),
  "cancel-edit": () => show({ follow: false }),
  before: (turn) => version(turn, -1),
  after: (turn) => version(turn, 1),
};

function version(turn, step) {
  const others = beside(conversation, turn);
  goTo(conversation, others[others.indexOf(turn) + step]);
  show({ follow: false });
  keep(conversation);
}

function turnOf(element) {
  return conversation.nodes[element.closest("[data-turn]")?.dataset.turn];
}

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.className === "copy-code") copy(button.closest(".code").querySelector("code").textContent, button);
  else if (!running || ["copy", "try-now", "new"].includes(button.dataset.action)) {
    ACTIONS[button.dataset.action]?.(turnOf(button), button);
  }
});

$("messages").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const turn = turnOf(event.target);
  if (event.target.className === "edit") {
    const text = event.target.querySelector("textarea").value.trim();
    if (text) answerTo(add(conversation, { role: "user", content: text }, turn.parent).id);
  } else {
    let parent = turn.id;
    for (const field of event.target.querySelectorAll("textarea")) {
      parent = add(conversation, { role: "tool", call: field.dataset.call, content: field.value }, parent).id;
    }
    answerTo(parent);
  }
});

$("messages").addEventListener("keydown", (event) => {
  if (event.target.tagName !== "TEXTAREA") return;
  if (event.key === "Escape") show({ follow: false });
  else if (sends(event)) { event.preventDefault(); event.target.form.requestSubmit(); }
});

// The server's state

const STATES = { ready: "ready", loading: "loading the model …", stopping: "stopping", failed: "failed" };
const OF_SEVERAL = {
  unloaded: "loads when it is asked", loading: "loading the model …", unloading: "leaves the memory", failed: "could not be loaded",
};

function setState(state, text) {
  $("state").dataset.state = state;
  if ($("state").textContent !== text) $("state").textContent = text;
  $("send").disabled = ["loading", "failed"].includes(state);
}

async function namesOfModels() {
  const response = await ask("v1/models");
  if (!response.ok) return;
  const names = (await response.json()).data.map((one) => one.id);
  const shown = Array.from($("models").options, (option) => option.value);
  if (names.join("\n") !== shown.join("\n")) {
    const chosen = $("models").value || names.find((name) => name === model) || names[0];
    $("models").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  }
  $("models").hidden = names.length < 2;
  $("model").hidden = names.length > 1;
}

let timer = 0;
let polls = 0;

async function poll(soon) {
  clearTimeout(timer);
  if (soon) { timer = setTimeout(poll, 50); return; }
  let next = document.hidden ? 10_000 : running || !model ? 1000 : 3000;
  try {
    const chosen = $("models").hidden ? "" : $("models").value;
    const response = await ask(chosen ? `stats?model=${encodeURIComponent(chosen)}` : "stats");
    if (response.ok) {
      const stats = await response.json();
      model = stats.model;
      context = stats.context || 0;
      $("model").textContent = model;
      document.title = `${model} · conmoe-edge`;
      const one = stats.models?.find((other) => other.name === model); // of several, which load when they are asked
      setState(stats.state, OF_SEVERAL[one?.state] || STATES[stats.state] || stats.state);
      figures(stats);
      if (polls++ % 10 === 0) await namesOfModels();
    }
  } catch (error) {
    if (error.kind === "key") {
      setState("gone", "waits for its API key");
      next = 3_600_000; // until something is asked
    } else if (error instanceof Failure) setState("gone", "the server does not answer");
    else throw error;
    polls = 0;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, next);
}

// Controls

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function send() {
  const text = $("question").value.trim();
  if (!text || running || $("send").disabled) return;
  $("question").value = "";
  grow();
  const question = add(conversation, { role: "user", content: text }, conversation.leaf);
  sessionStorage.setItem(OPENED, conversation.id);
  answerTo(question.id);
}

function isDrawer(toggle, panel) {
  $(toggle).addEventListener("click", () => {
    const opened = !$(panel).classList.contains("open");
    closeDrawers();
    $(panel).classList.toggle("open", opened);
    $(toggle).setAttribute("aria-expanded", String(opened));
  });
}

function closeDrawers() {
  for (const [toggle, panel] of DRAWERS) {
    $(panel).classList.remove("open");
    $(toggle).setAttribute("aria-expanded", "false");
  }
}

const DRAWERS = [["figures-toggle", "figures"], ["list-toggle", "list"]];
for (const [toggle, panel] of DRAWERS) isDrawer(toggle, panel);

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (sends(event)) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) stop();
  else closeDrawers();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll(true);
  else if (running) keep(conversation); // the tab may be closed in the middle of an answer
});
$("models").addEventListener("change", () => poll(true));
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", startAnew);
$("ideas").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  $("question").value = event.target.textContent;
  send();
});

async function start() {
  startSettings();
  poll();
  await startList({
    open,
    gone: (id) => { if (id === conversation.id) startAnew(); },
    renamed: (id, title) => { if (id === conversation.id) conversation.title = title; },
  });
  const opened = sessionStorage.getItem(OPENED);
  if (opened && conversation.leaf === null) await reopen(opened);
}

start();
