// What /stats says, drawn: speed, memory by what it is used for, and where the prototypes lie.

const $ = (id) => document.getElementById(id);
const MIB = 1 << 20, GIB = 1 << 30;
const MOST_CELLS = 192; // of the drawing; beyond that one cell stands for several prototypes
const SVG = "http://www.w3.org/2000/svg";

const lately = []; // share of prototypes found, at most 60 polls
let before = null; // hits and misses of the poll before
let own = null; // {first, last, pieces} of the answer that this page gets

export function bytes(value) {
  if (!value) return "0";
  if (value >= GIB) return `${(value / GIB).toFixed(2)} GiB`;
  return value >= MIB ? `${(value / MIB).toFixed(value < 10 * MIB ? 1 : 0)} MiB` : `${Math.round(value / 1024)} KiB`;
}

/** A speed that is never shown as nothing. */
export function rate(value) {
  return value >= 1 ? value.toFixed(1) : value.toPrecision(2);
}

// Speed

/** An answer of this page begins; `pieceCame` for each piece of it, `speedOver` at its end. */
export function speedBegins() {
  own = { first: 0, last: 0, pieces: 0 };
  $("speed-note").textContent = "waiting for the first token";
}

export function pieceCame() {
  const now = performance.now();
  own.first ||= now;
  own.last = now;
  own.pieces += 1;
  if (own.pieces > 1 && now - own.first > 500) $("speed-note").textContent = "";
}

export function speedOver(perSecond, note) {
  own = null;
  if (perSecond > 0) $("speed").textContent = rate(perSecond);
  $("speed-note").textContent = note;
}

function speed(stats) {
  const mine = own && own.pieces > 1 ? (1000 * (own.pieces - 1)) / Math.max(own.last - own.first, 1) : 0;
  const now = stats.tokens_per_second || mine;
  if (stats.running && now > 0) $("speed").textContent = rate(now);
  const others = stats.queued ? `, ${stats.queued} waiting` : "";
  $("now").textContent = `${stats.running} of ${stats.parallel} answers being made${others}; `
    + `${stats.totals.completion_tokens.toLocaleString("en")} tokens since the start`;
}

// Memory and tiers

export function figures(stats) {
  speed(stats);
  if (stats.compute) {
    const path = stats.compute.fast_path ? `; fast path: ${stats.compute.fast_path.summary}` : "";
    $("compute-note").textContent = `kernel: ${stats.compute.kernel}${path}`;
  }
  if (!stats.memory || !stats.cache) return;
  const gpu = !stats.memory.device.startsWith("cpu");
  const name = gpu ? "GPU memory" : "RAM";
  $("tiers").hidden = false;
  $("device-name").textContent = name;
  memory(stats.memory, stats.cache);
  prototypes(stats.cache, name, gpu);
}

function memory(memory, cache) {
  const { used, budget } = memory;
  const whole = Math.max(budget || used, used);
  const slots = cache.prototypes ? Math.min(memory.slots, used) : 0;
  const talk = Math.min(memory.conversations, used - slots);
  const parts = { slots, talk, rest: used - slots - talk, free: whole - used };
  $("memory").textContent = bytes(used);
  $("memory-of").textContent = budget ? `of ${bytes(budget)}` : "in use, no budget";
  for (const [part, value] of Object.entries(parts)) {
    $(`part-${part}`).style.flexGrow = String(value / whole);
    $(`size-${part}`).textContent = bytes(value);
  }
  $("memory-bar").dataset.full = String(Boolean(budget) && used > budget);
  $("memory-bar").setAttribute("aria-label", `${bytes(used)} in use${budget ? ` of ${bytes(budget)}` : ""}: `
    + `${bytes(slots)} prototypes, ${bytes(talk)} conversations, ${bytes(parts.rest)} the rest, ${bytes(parts.free)} free`);
  $("talk-of").textContent = `of ${bytes(memory.conversations_planned)}`;
}

function prototypes(cache, name, gpu) {
  const { prototypes: all, resident } = cache;
  if (!all) {
    $("cells").replaceChildren();
    $("device-count").textContent = "this model was left whole";
    $("below").hidden = true;
    return;
  }
  const count = (value) => value.toLocaleString("en");
  cells(all, resident, name);
  $("device-count").textContent = `${count(resident)} of ${count(all)} prototypes fit at once`;
  $("below").hidden = false;
  $("host-tier").hidden = !gpu;
  $("host-note").textContent = `${bytes(cache.host_bytes)} read since the start`;
  $("disk-note").textContent = `all ${count(all)} prototypes; ${bytes(cache.disk_bytes)} read since the start`;
  found(cache);
}

function found(cache) {
  if (before && cache.hits >= before.hits) {
    const hits = cache.hits - before.hits, asked = hits + cache.misses - before.misses;
    if (asked > 0) {
      lately.push(hits / asked);
      if (lately.length > 60) lately.shift();
    }
  }
  before = { hits: cache.hits, misses: cache.misses };
  const asked = cache.hits + cache.misses;
  const share = lately.length ? lately[lately.length - 1] : asked ? cache.hits / asked : null;
  $("hits").textContent = share === null ? "–" : percent(share);
  $("hits-of").textContent = share === null ? "nothing asked for yet" : lately.length ? "found there lately" : "found there so far";
  const step = 120 / 59;
  const points = lately.map((one, i) => `${((60 - lately.length + i) * step).toFixed(1)},${(23 - 22 * one).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
  $("spark").toggleAttribute("hidden", lately.length < 2);
}

function percent(share) {
  const value = 100 * share;
  return `${value > 99 && value < 100 ? Math.floor(10 * value) / 10 : Math.round(value)} %`; // 100 means all
}

let drawn = "";

function cells(all, resident, name) {
  const each = Math.ceil(all / MOST_CELLS), number = Math.ceil(all / each);
  const state = `${all} ${resident}`;
  $("cells-note").textContent = each > 1 ? `a square is ${each} prototypes` : "a square is a prototype";
  if (state === drawn) return;
  drawn = state;
  const columns = 24, side = 10, gap = 2;
  const svg = $("cells"), there = Math.round(resident / each);
  svg.setAttribute("viewBox", `0 0 ${columns * (side + gap) - gap} ${Math.ceil(number / columns) * (side + gap) - gap}`);
  svg.setAttribute("aria-label", `${resident} of ${all} prototypes fit into ${name} at once`);
  const squares = Array.from({ length: number }, (_, index) => {
    const square = document.createElementNS(SVG, "rect");
    square.setAttribute("x", String((index % columns) * (side + gap)));
    square.setAttribute("y", String(Math.floor(index / columns) * (side + gap)));
    square.setAttribute("width", String(side));
    square.setAttribute("height", String(side));
    square.setAttribute("rx", "2");
    square.setAttribute("class", index < there ? "here" : "below");
    return square;
  });
  svg.replaceChildren(...squares);
}
