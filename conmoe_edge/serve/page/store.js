// Conversations in this browser's own database: "heads" for the list, "bodies" with the turns. Nothing leaves the browser.

const NAME = "conmoe-edge";
let database = null;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version of it"));
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

async function open() {
  if (database) return database;
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("heads", { keyPath: "id" });
    request.result.createObjectStore("bodies", { keyPath: "id" });
  };
  const found = await done(request);
  found.onversionchange = () => { found.close(); database = null; };
  found.onclose = () => { database = null; };
  database = found;
  return found;
}

/** All heads, the one that changed last first. */
export async function list() {
  const heads = await done((await open()).transaction("heads").objectStore("heads").getAll());
  return heads.sort((a, b) => b.changed - a.changed);
}

export async function load(id) {
  return done((await open()).transaction("bodies").objectStore("bodies").get(id));
}

export async function all() {
  return done((await open()).transaction("bodies").objectStore("bodies").getAll());
}

/** Keep a conversation; its head and its turns are written together or not at all. */
export async function save(conversation) {
  const { id, title, created, changed, model } = conversation;
  const transaction = (await open()).transaction(["heads", "bodies"], "readwrite");
  const end = finished(transaction);
  try {
    transaction.objectStore("heads").put({ id, title, created, changed, model });
    transaction.objectStore("bodies").put(structuredClone(conversation));
  } catch (error) {
    end.catch(() => {}); // the same, once more
    throw error;
  }
  return end;
}

export async function forget(id) {
  const transaction = (await open()).transaction(["heads", "bodies"], "readwrite");
  transaction.objectStore("heads").delete(id);
  transaction.objectStore("bodies").delete(id);
  return finished(transaction);
}

/** Why it could not be kept, in a sentence. */
export function why(error) {
  if (error?.name === "QuotaExceededError") {
    return "This browser has no more room for conversations: the newest turns are not kept. "
      + "Export what you need and delete some conversations.";
  }
  return `This browser keeps no conversations (${error?.message || error?.name || "no reason given"}): `
    + "what is said here is gone when the tab is closed.";
}
