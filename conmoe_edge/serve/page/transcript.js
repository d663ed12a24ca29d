// Draws the turns of a conversation. What is said becomes text nodes, or markdown by markdown.js.

import { beside, isUnanswered } from "./conversation.js";
import { rate } from "./figures.js";
import { GrowingMarkdown } from "./markdown.js";

const list = document.getElementById("messages");
const PLACES = { full: "the context is full", gone: "no connection", lost: "connection lost", key: "API key", busy: "busy" };

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

export function button(text, action, label = "") {
  const made = make("button", "quiet", text);
  made.type = "button";
  made.dataset.action = action;
  if (label) made.setAttribute("aria-label", label);
  return made;
}

/** Draw what changed of `turns`; `live` is the item of the one that is being answered. What is there is left alone, with
 * all that a reader has unfolded or selected in it. */
export function drawAll(conversation, turns, running, live) {
  const there = new Map(Array.from(list.children, (item) => [item.dataset.turn, item]));
  turns.forEach((turn, index) => {
    const old = there.get(turn.id), last = index === turns.length - 1;
    const item = live?.turn === turn ? live.item : old && !old.querySelector("form") ? old : itemOf(turn, turns);
    item.classList.toggle("unsent", turn.role === "user" && isUnanswered(turns, index));
    item.classList.toggle("busy", live?.turn === turn);
    drawActions(item, conversation, turn, running);
    if (turn.calls?.length && last && !running && !turn.problem) item.append(resultsForm(turn));
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] || null);
  });
  while (list.children.length > turns.length) list.lastChild.remove();
}

function itemOf(turn, turns) {
  if (turn.role === "user") return questionItem(turn);
  if (turn.role === "tool") return resultItem(turn, turns);
  const made = new AnswerItem(turn);
  made.finish();
  return made.item;
}

function questionItem(turn) {
  const item = make("li", "mine");
  item.dataset.turn = turn.id;
  item.append(make("h3", "off-screen", "You"));
  const body = make("div", "text");
  body.dir = "auto"; // text from right to left too
  body.append(turn.content);
  item.append(body);
  return item;
}

function resultItem(turn, turns) {
  const call = turns.flatMap((one) => one.calls || []).find((one) => one.id === turn.call);
  const item = make("li", "result");
  item.dataset.turn = turn.id;
  const fold = make("details", "fold");
  fold.append(make("summary", "", `Result of ${call?.name || "a tool"}`), make("pre", "", turn.content));
  item.append(fold);
  return item;
}

/** The item of an answer, which may still be growing. */
export class AnswerItem {
  constructor(turn) {
    this.turn = turn;
    this.item = make("li", "answer");
    this.item.dataset.turn = turn.id;
    this.item.append(make("h3", "off-screen", "Answer"));
    if (turn.leftOut && turn.leftOutNow) this.note(leftOutText(turn));
    this.body = make("div", "text");
    this.body.dir = "auto";
    this.item.append(this.body);
    this.markdown = new GrowingMarkdown(this.body);
    this.calls = [];
  }

  /** The answer is over. */
  finish() {
    this.show(true);
    if (this.turn.problem) this.problem(this.turn.problem);
    if (words(this.turn).length) this.under();
    this.item.classList.remove("busy");
  }

  note(text) {
    const note = make("p", "left-out", text);
    note.setAttribute("role", "note");
    if (this.body) this.body.before(note);
    else this.item.append(note);
  }

  /** Reasoning stands folded above the answer. */
  reason() {
    if (!this.thoughts) {
      const fold = make("details", "fold reasoning");
      this.thinking = make("summary", "", "Reasoning");
      this.thoughts = make("div", "thoughts");
      this.thoughts.dir = "auto";
      this.thoughts.append(document.createTextNode(""));
      fold.append(this.thinking, this.thoughts);
      this.body.before(fold);
    }
    const node = this.thoughts.firstChild, text = this.turn.reasoning;
    if (text.length > node.length) node.appendData(text.slice(node.length));
    const seconds = this.turn.thoughtFor;
    this.thinking.textContent = seconds === undefined ? "Reasoning …" : seconds < 0.1 ? "Reasoning" : `Reasoned for ${seconds.toFixed(1)} s`;
  }

  /** Calls stand folded below it. */
  call(call, index) {
    if (!this.calls[index]) {
      const fold = make("details", "fold call");
      const name = make("summary", "", "Calls ");
      const given = make("span", "brief"), whole = make("pre");
      name.append(make("code", "", call.name), given);
      fold.append(name, whole);
      this.item.append(fold);
      this.calls[index] = { given, whole, text: null };
    }
    const drawn = this.calls[index];
    if (drawn.text === call.arguments) return;
    drawn.text = call.arguments;
    drawn.given.textContent = brief(call.arguments);
    drawn.whole.textContent = pretty(call.arguments);
  }

  show(end = false) {
    if (this.turn.reasoning) this.reason();
    if (this.turn.content) this.markdown.show(this.turn.content, end);
    this.turn.calls?.forEach((call, index) => this.call(call, index));
  }

  problem({ kind, text, hint }) {
    const box = make("div", "problem");
    box.setAttribute("role", "alert");
    const said = make("p");
    if (PLACES[kind]) said.append(make("strong", "", `${PLACES[kind][0].toUpperCase()}${PLACES[kind].slice(1)}. `));
    said.append(text);
    box.append(said);
    if (hint) box.append(make("p", "hint", hint));
    const row = make("div", "row");
    if (kind === "full") row.append(button("Retry without the oldest turns", "retry-shorter"), button("New chat", "new"));
    else if (kind === "key") row.append(button("Enter the key and retry", "retry"));
    else row.append(button("Retry", "retry"));
    box.append(row);
    this.item.append(box);
  }

  /** Say that the server is busy, and how long it will be until the next try. */
  wait(text) {
    this.waiting ||= this.item.appendChild(make("div", "waiting"));
    if (!this.waiting.firstChild) {
      this.waiting.append(make("span"), button("Try now", "try-now"));
      this.waiting.firstChild.setAttribute("role", "status");
    }
    this.waiting.firstChild.textContent = text;
  }

  waited() {
    this.waiting?.remove();
    this.waiting = null;
  }

  under() {
    const line = make("div", "under");
    line.append(...words(this.turn).map((word) => make("span", "", word)));
    this.item.append(line);
  }
}

export function leftOutText(turn) {
  return `The context is full: the oldest ${turn.leftOut === 1 ? "message is" : `${turn.leftOut} messages are`} no longer sent. `
    + "They stay here for you to read.";
}

function words(turn) {
  const found = [];
  if (turn.usage) {
    found.push(`${turn.usage.completion_tokens} tokens`);
    if (turn.perSecond > 0) found.push(`${rate(turn.perSecond)} tokens/s`);
  }
  if (turn.firstAfter !== undefined) found.push(`first token ${turn.firstAfter.toFixed(1)} s`);
  const known = turn.usage?.prompt_tokens_details?.cached_tokens;
  if (known) found.push(`${known} of ${turn.usage.prompt_tokens} prompt tokens were known`);
  if (turn.stopped) found.push("stopped");
  if (turn.finish === "length") {
    const wanted = turn.most && turn.usage?.completion_tokens >= turn.most;
    found.push(wanted ? "cut at the longest answer of the settings" : "cut at the server’s longest answer or the end of the context");
  }
  if (turn.finish && !turn.content && !turn.calls?.length) found.push("an empty answer");
  if (turn.ignored) found.push(`left out by the server: ${turn.ignored}`);
  return found;
}

/** What can be done with a turn. */
export function drawActions(item, conversation, turn, running) {
  item.querySelector(".actions")?.remove();
  if (turn.role === "tool") return;
  const row = make("div", "actions");
  const others = beside(conversation, turn);
  if (others.length > 1) {
    const at = others.indexOf(turn);
    const back = button("‹", "before", "The version before"), on = button("›", "after", "The next version");
    back.disabled = running || at === 0;
    on.disabled = running || at === others.length - 1;
    row.append(back, make("span", "count", `${at + 1} of ${others.length}`), on);
  }
  if (turn.content) row.append(button("Copy", "copy"));
  if (!running && turn.role === "user") row.append(button("Edit", "edit"));
  else if (!running && !turn.problem) row.append(button("Regenerate", "retry")); // a problem has its own way out
  if (row.childNodes.length) item.append(row);
}

/** The question becomes a field; what it held stays beside what is sent. */
export function editQuestion(item, turn) {
  const form = make("form", "edit");
  const field = make("textarea");
  field.value = turn.content;
  field.rows = Math.min(12, turn.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edited message");
  const send = button("Send", "send-edited");
  send.type = "submit";
  const row = make("div", "row");
  row.append(send, button("Cancel", "cancel-edit"));
  form.append(field, row);
  item.querySelector(".text").replaceWith(form);
  item.querySelector(".actions")?.remove();
  field.focus();
}

/** A field for what each called tool returned. */
function resultsForm(turn) {
  const form = make("form", "results");
  form.append(...turn.calls.map((call) => {
    const label = make("label", "", `What ${call.name} returned`);
    const field = make("textarea");
    field.rows = 2;
    field.dataset.call = call.id;
    label.append(field);
    return label;
  }));
  const send = button("Send results", "send-results");
  send.type = "submit";
  form.append(send);
  return form;
}

function brief(text) {
  const line = text.replace(/\s+/g, " ");
  return line.length > 60 ? ` ${line.slice(0, 59)}…` : ` ${line}`;
}

/** JSON with line breaks, where that says the same: a number of twenty digits or a key that is there twice stays as it is. */
function pretty(text) {
  try {
    const value = JSON.parse(text), bare = (one) => one.replace(/\s/g, "");
    return bare(JSON.stringify(value)) === bare(text) ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text;
  }
}
