// A conversation is a tree of turns: another answer, or an edited question, stands beside the one before and loses nothing.
// What is shown and sent is the way from the root to `leaf`.

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (one) => one.toString(36)).join("");

export function newConversation() {
  return { id: newId(), title: "", created: Date.now(), changed: Date.now(), model: "", nodes: {}, leaf: null };
}

/** Add a turn behind `parent` (an id or null) and make it the last one. */
export function add(conversation, turn, parent) {
  const node = { id: newId(), parent, at: Date.now(), content: "", ...turn };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.changed = node.at;
  if (!conversation.title && turn.role === "user") conversation.title = titleOf(turn.content);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** The turns from the first to `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const turns = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) turns.unshift(node);
  return turns;
}

/** The turns that stand at the place of `node`, in their order. */
export function beside(conversation, node) {
  return Object.values(conversation.nodes).filter((one) => one.parent === node.parent).sort((a, b) => a.at - b.at);
}

/** Show `node` and what came after it last. */
export function goTo(conversation, node) {
  const after = Object.values(conversation.nodes);
  for (let next = node; next;) {
    conversation.leaf = next.id;
    const children = after.filter((one) => one.parent === next.id).sort((a, b) => a.at - b.at);
    next = children[children.length - 1];
  }
}

/** Take out a turn that nothing follows. */
export function remove(conversation, node) {
  delete conversation.nodes[node.id];
  if (conversation.leaf === node.id) conversation.leaf = node.parent;
}

/** What the server gets of `turns`: a question whose answer never came is left out with it. */
export function messages(turns) {
  const sent = [];
  turns.forEach((turn, index) => {
    if (turn.role === "assistant") {
      if (turn.content || turn.calls?.length) sent.push(answerOf(turn));
    } else if (turn.role === "tool") {
      sent.push({ role: "tool", tool_call_id: turn.call, content: turn.content });
    } else if (!isUnanswered(turns, index)) {
      sent.push({ role: "user", content: turn.content });
    }
  });
  return sent;
}

function answerOf(turn) {
  const message = { role: "assistant", content: turn.content || null };
  if (turn.calls?.length) {
    message.tool_calls = turn.calls.map((call) => ({
      id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
    }));
  }
  return message;
}

export function isUnanswered(turns, index) {
  const answer = turns[index + 1];
  return Boolean(answer) && index + 2 < turns.length && answer.role === "assistant"
    && !answer.content && !answer.calls?.length;
}

export function asMarkdown(conversation) {
  const lines = [`# ${conversation.title || "Conversation"}`];
  for (const turn of path(conversation)) {
    if (turn.role === "user") lines.push("## You", turn.content);
    else if (turn.role === "tool") lines.push("## Result of a tool", fenced(turn.content));
    else {
      lines.push(`## ${turn.model || "Answer"}`);
      if (turn.leftOut) lines.push(`*${turn.leftOut} of the oldest messages were not sent: the context was full.*`);
      if (turn.reasoning) lines.push(`<details><summary>Reasoning</summary>\n\n${turn.reasoning}\n\n</details>`);
      if (turn.content) lines.push(turn.content);
      for (const call of turn.calls || []) lines.push(`Calls \`${call.name}\`:`, fenced(call.arguments));
      if (turn.problem) lines.push(`*${turn.problem.text}*`);
    }
  }
  return `${lines.join("\n\n")}\n`;
}

function fenced(text) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), (found) => found[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

export function asJson(conversations) {
  return JSON.stringify({ format: "conmoe-edge conversations", version: 1, conversations }, null, 2);
}
