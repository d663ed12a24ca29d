// The settings beside the conversation. What is left empty is the model's own. They are kept in this browser.

import { Failure } from "./server.js";

const $ = (id) => document.getElementById(id);
const KEPT = "conmoe-settings";
const NUMBERS = { // field: its name in a request, and whether it is whole
  temperature: ["temperature", false], "top-p": ["top_p", false], "top-k": ["top_k", true], "min-p": ["min_p", false],
  "max-tokens": ["max_tokens", true], seed: ["seed", true],
};
const FIELDS = [...Object.keys(NUMBERS), "system", "reasoning", "tools", "on-full"];

export function startSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT)) || {};
  } catch { /* none, or another's */ }
  for (const name of FIELDS) {
    if (typeof kept[name] === "string") $(name).value = kept[name];
    $(name).addEventListener("input", keep);
  }
  if (!$("on-full").value) $("on-full").value = "drop";
  $("settings-reset").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = name === "on-full" ? "drop" : "";
    keep();
  });
  check();
}

function keep() {
  check();
  try {
    localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(FIELDS.map((name) => [name, $(name).value]))));
  } catch { /* the values hold until the tab is closed */ }
}

/** Say beside a field what is wrong with it. */
function check() {
  for (const name of Object.keys(NUMBERS)) {
    $(name).setAttribute("aria-invalid", String(!$(name).checkValidity()));
  }
  let wrong = "";
  try {
    tools();
  } catch (error) {
    wrong = error.message;
  }
  $("tools").setAttribute("aria-invalid", String(Boolean(wrong)));
  $("tools-wrong").textContent = wrong;
  const changed = FIELDS.filter((name) => $(name).value && $(name).value !== "drop").length;
  $("settings-changed").textContent = changed ? `${changed} changed` : "";
}

function tools() {
  const text = $("tools").value.trim();
  if (!text) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Failure("refused", `The tools in the settings are no JSON: ${error.message}.`);
  }
  const list = Array.isArray(value) ? value : [value];
  return list.map((one) => (one?.type ? one : { type: "function", function: one }));
}

/** Fields of a request, the messages apart. */
export function wishes() {
  const value = {};
  for (const [name, [field, whole]] of Object.entries(NUMBERS)) {
    const text = $(name).value.trim();
    if (!text) continue;
    if (!$(name).checkValidity()) throw new Failure("refused", `${$(name).labels[0].firstChild.textContent.trim()}: ${$(name).validationMessage}`);
    value[field] = whole ? parseInt(text, 10) : Number(text);
  }
  if ($("reasoning").value) value.reasoning_effort = $("reasoning").value;
  const given = tools();
  if (given) value.tools = given;
  return value;
}

export function systemText() {
  return $("system").value.trim();
}

export function dropsWhenFull() {
  return $("on-full").value === "drop";
}
