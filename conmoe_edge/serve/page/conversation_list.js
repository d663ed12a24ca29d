// The conversations that this browser keeps: found, opened, renamed, deleted, exported.

import { asJson, asMarkdown } from "./conversation.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
let heads = [];
let current = "";
let hooks = null; // {open(conversation), gone(id), renamed(id, title)}

export function startList(given) {
  hooks = given;
  $("find").addEventListener("input", draw);
  $("conversations").addEventListener("click", clicked);
  $("export-all").addEventListener("click", guarded(async () => {
    download("conversations.json", asJson(await store.all()), "application/json");
  }));
  document.addEventListener("click", (event) => {
    for (const menu of document.querySelectorAll("#conversations details[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });
  return refresh();
}

export const refresh = guarded(async (shown = current) => {
  current = shown;
  heads = await store.list();
  draw();
});

/** Keep a conversation and show it in the list. */
export const keep = guarded(async (conversation) => {
  await store.save(conversation);
  await refresh(conversation.id);
});

/** Open a conversation by its id, where it is still there. */
export const reopen = guarded(async (id) => {
  const conversation = await store.load(id);
  if (!conversation) return;
  hooks.open(conversation);
  await refresh(id);
});

/** Whatever goes wrong with the browser's storage is said where the list is, and in the page's own words. */
function guarded(action) {
  return async (...given) => {
    try {
      await action(...given);
      $("storage-problem").hidden = true;
    } catch (error) {
      $("storage-problem").textContent = store.why(error);
      $("storage-problem").hidden = false;
      $("list-toggle").dataset.problem = "true";
    }
  };
}

function draw() {
  const wanted = $("find").value.trim().toLocaleLowerCase();
  const shown = heads.filter((head) => !wanted || head.title.toLocaleLowerCase().includes(wanted));
  $("conversations").replaceChildren(...shown.map(row));
  $("no-conversations").hidden = heads.length > 0;
  $("export-all").hidden = heads.length < 2;
  $("find").hidden = heads.length < 6 && !wanted;
}

function row(head) {
  const item = document.createElement("li");
  item.dataset.id = head.id;
  const open = document.createElement("button");
  open.type = "button";
  open.className = "open";
  open.dataset.action = "open";
  const title = document.createElement("span"), when = document.createElement("small");
  title.textContent = head.title || "Conversation";
  title.dir = "auto";
  when.textContent = whenOf(head.changed);
  open.append(title, when);
  if (head.id === current) open.setAttribute("aria-current", "true");
  const menu = document.createElement("details"), dots = document.createElement("summary");
  menu.className = "menu";
  dots.textContent = "⋯";
  dots.setAttribute("aria-label", `More about “${head.title}”`);
  const actions = document.createElement("div");
  for (const [name, text] of [
    ["rename", "Rename"], ["markdown", "Export as Markdown"], ["json", "Export as JSON"], ["delete", "Delete"],
  ]) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.action = name;
    button.textContent = text;
    actions.append(button);
  }
  menu.append(dots, actions);
  item.append(open, menu);
  return item;
}

function whenOf(time) {
  const then = new Date(time), now = new Date();
  return then.toDateString() === now.toDateString()
    ? then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : then.toLocaleDateString([], { day: "numeric", month: "short", year: then.getFullYear() === now.getFullYear() ? undefined : "numeric" });
}

const clicked = guarded(async (event) => {
  const button = event.target.closest("button[data-action]");
  if (!button) return;
  const { id } = button.closest("li").dataset, action = button.dataset.action;
  const menu = button.closest("details");
  if (menu) menu.open = false;
  const conversation = await store.load(id);
  if (!conversation) return refresh(); // another tab has deleted it
  if (action === "open") {
    hooks.open(conversation);
    return refresh(id);
  }
  if (action === "markdown") return download(fileName(conversation, "md"), asMarkdown(conversation), "text/markdown");
  if (action === "json") return download(fileName(conversation, "json"), asJson([conversation]), "application/json");
  if (action === "rename") {
    const title = await inDialog({ title: "Rename", yes: "Rename", value: conversation.title });
    if (!title?.trim()) return;
    conversation.title = title.trim();
    await store.save(conversation);
    hooks.renamed(id, conversation.title);
  } else if (action === "delete") {
    const text = `“${conversation.title}” is kept in this browser alone, and gone when it is deleted.`;
    if ((await inDialog({ title: "Delete this conversation?", text, yes: "Delete" })) === null) return;
    await store.forget(id);
    hooks.gone(id);
  }
  await refresh();
});

/** What was typed, "" where there is no field, or null where it was called off. */
function inDialog({ title, text = "", yes, value }) {
  const dialog = $("one-dialog"), field = $("one-value");
  $("one-title").textContent = title;
  $("one-text").textContent = text;
  $("one-text").hidden = !text;
  $("one-yes").textContent = yes;
  field.hidden = value === undefined;
  field.value = value ?? "";
  dialog.returnValue = "no";
  dialog.showModal();
  field.select();
  return new Promise((resolve) => {
    const closed = () => resolve(dialog.returnValue === "yes" ? field.value : null);
    dialog.addEventListener("close", closed, { once: true });
  });
}

function fileName(conversation, end) {
  const name = conversation.title.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40);
  return `${name || "conversation"}.${end}`;
}

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
