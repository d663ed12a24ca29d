// A conversation that has grown longer than its context: its oldest turns are no longer sent, as `chat` does it. The system
// text and the question always stay. All that follows is computed anew then, so half of the context is made free at once.

import { Failure, failureOf, post } from "./server.js";

const LEAST_ROOM = 8; // an eighth of the context for the answer, or what was asked for at the most
const MESSAGE_TOKENS = 32; // more than any template puts around a message

/** The places in `sent` where something may begin that is sent: at a question. */
export function beginnings(sent) {
  return sent.flatMap((message, index) => (message.role === "user" ? [index] : []));
}

/** How many of `sent` to leave out, at least `already`.
 * `context` in tokens, or 0 where it is not known; then the server's refusal says when it is full (`more`). */
export async function leaveOut({ sent, first, already, context, most, model, signal }) {
  if (!context) return already;
  const places = beginnings(sent).filter((index) => index >= already);
  const room = Math.max(1, Math.min(most || Infinity, Math.floor(context / LEAST_ROOM)));
  const count = async (from) => {
    const asked = [...first, ...sent.slice(from)];
    const bytes = new TextEncoder().encode(JSON.stringify(asked)).length;
    const least = asked.length * MESSAGE_TOKENS + bytes; // no token is less than a byte
    if (least + room <= context) return least;
    const response = await post("tokenize", { model, messages: asked }, signal);
    if (response.ok) return (await response.json()).count;
    const failed = await failureOf(response);
    if (failed.kind === "full" || response.status === 413) return Infinity;
    throw failed;
  };
  if (!places.length || (await count(places[0])) + room <= context) return already;
  let low = 1, high = places.length - 1; // the fewest that leave half of the context free
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((await count(places[middle])) <= context / 2) high = middle;
    else low = middle + 1;
  }
  return places.length > 1 ? places[low] : already;
}

/** One turn more, after the server has said that it is too long. */
export function more(sent, already) {
  const place = beginnings(sent).find((index) => index > already);
  if (place === undefined) throw new Failure("refused", "This message alone is longer than the model can hold: edit it, or split it.");
  return place;
}
