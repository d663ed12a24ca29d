// Talks to this server: the key, requests, streams of events, and what goes wrong with them.

let key = sessionStorage.getItem("conmoe-key") || "";
let asking = null;

/** Why there is no answer. `kind`: full, key, busy, gone, lost, refused. `wait`: seconds until another try may do. */
export class Failure extends Error {
  constructor(kind, text, wait = 0) {
    super(text);
    this.kind = kind;
    this.wait = wait;
  }
}

/** Fetch `path` with the key. A wrong key is asked for until there is a right one or the person gives up. */
export async function ask(path, options = {}) {
  while (true) {
    const headers = { ...(options.headers || {}) };
    const given = key;
    if (given) headers.Authorization = `Bearer ${given}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Failure("gone", "The server cannot be reached. It may have been stopped, or the connection is down.");
    }
    if (response.status !== 401) return response;
    if (given === key && !(await askForKey(Boolean(given)))) {
      throw new Failure("key", "This server asks for an API key.");
    }
  }
}

export function askForKey(wrong) {
  asking ||= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-wrong").hidden = !wrong;
    field.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "given" ? field.value.trim() : "";
      if (given) {
        key = given;
        sessionStorage.setItem("conmoe-key", key);
      }
      asking = null;
      resolve(Boolean(given));
    }, { once: true });
  });
  return asking;
}

/** POST a JSON value. */
export function post(path, value, signal) {
  // Half of a surrogate pair is no text, and the server would refuse the whole conversation for it.
  const body = JSON.stringify(value, (_, one) => (one?.toWellFormed ? one.toWellFormed() : one));
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

/** What a response that is no answer means. */
export async function failureOf(response) {
  let said = null;
  try {
    said = (await response.json()).error;
  } catch { /* a proxy's page, or nothing */ }
  return failure(response.status, said, Number(response.headers.get("Retry-After")) || 0);
}

export function failure(status, said, wait = 0) {
  const text = said?.message || `The server answered ${status}.`;
  if (said?.code === "context_length_exceeded") return new Failure("full", text);
  if (status === 429 || (status === 503 && said?.code !== "stopping")) return new Failure("busy", text, wait || 5);
  if (status === 503) return new Failure("gone", text);
  return new Failure("refused", text);
}

/** The values of a stream, until its end. One that breaks off is a Failure. */
export async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      read = { done: true };
    }
    if (signal.aborted) return;
    if (read.done) throw new Failure("lost", "The connection ended before the answer did.");
    rest += read.value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment: still here
      if (part === "data: [DONE]") return;
      const value = JSON.parse(part.slice(6));
      if (value.error) throw failure(500, value.error);
      yield value;
    }
  }
}
