// Markdown that grows. An answer never becomes markup of its own: markdown-it escapes HTML, what it makes goes through
// DOMPurify, and links lead to http, https and mailto alone.

const MOST = 100_000; // characters; a longer text is shown as it is
const MOST_TOKENS = 6000; // of markdown-it
const TAGS = [
  "p", "br", "hr", "h3", "h4", "h5", "h6", "strong", "em", "s", "blockquote", "ul", "ol", "li",
  "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "a", "div", "span",
];

const parser = window.markdownit({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // "main.py" is no address
parser.validateLink = (url) => /^(https?:|mailto:)/i.test(url.trim());
parser.disable("image"); // nothing is loaded; what is left of it is a link

const rules = parser.renderer.rules;
rules.fence = (tokens, index) => code(tokens[index].content, tokens[index].info.trim().split(/\s+/)[0]);
rules.code_block = (tokens, index) => code(tokens[index].content, "");
rules.table_open = () => '<div class="table"><table>';
rules.table_close = () => "</table></div>";
rules.heading_open = rules.heading_close = (tokens, index, options, env, renderer) => {
  tokens[index].tag = `h${Math.min(6, Number(tokens[index].tag[1]) + 2)}`; // below the headings of the page
  return renderer.renderToken(tokens, index, options);
};
rules.th_open = rules.td_open = (tokens, index, options, env, renderer) => {
  const style = tokens[index].attrGet("style");
  tokens[index].attrs = style ? [["class", style.replace("text-align:", "")]] : null; // the policy forbids styles
  return renderer.renderToken(tokens, index, options);
};
rules.link_open = (tokens, index, options, env, renderer) => {
  tokens[index].attrSet("rel", "noopener noreferrer nofollow");
  tokens[index].attrSet("target", "_blank");
  return renderer.renderToken(tokens, index, options);
};

function code(text, language) {
  const { escapeHtml } = parser.utils;
  const name = escapeHtml(language.slice(0, 30));
  const lines = escapeHtml(text.replace(/\n$/, ""));
  return `<div class="code"><div class="code-head"><span>${name}</span></div><pre><code>${lines}</code></pre></div>`;
}

function elements(tokens, env) {
  const html = parser.renderer.render(tokens, parser.options, env);
  const found = window.DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "rel", "target", "class", "start"],
    ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true,
    ADD_ATTR: ["target"],
  });
  for (const node of [...found.childNodes]) if (node.nodeType === Node.TEXT_NODE) node.remove(); // line breaks
  for (const head of found.querySelectorAll(".code-head")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy-code";
    button.textContent = "Copy";
    head.append(button);
  }
  return found;
}

/** The element of an answer. The text only grows: blocks that are over are left alone, and of the last ones only what
 * differs is changed, so that nothing flickers and what is selected stays selected. */
export class GrowingMarkdown {
  constructor(target) {
    this.target = target;
    this.offset = 0; // characters of blocks that are over
    this.settled = 0; // and their elements
    this.plain = false;
  }

  /** Show `text`; at its `end` it is read once more as a whole. */
  show(text, end = false) {
    const whole = text.replace(/\r\n?/g, "\n");
    if (this.plain || whole.length > MOST) return this.asItIs(whole);
    if (end) this.offset = this.settled = 0;
    const rest = whole.slice(this.offset), env = {};
    let tokens;
    try {
      tokens = parser.parse(rest, env);
    } catch {
      return this.asItIs(whole);
    }
    if (tokens.length > MOST_TOKENS) return this.asItIs(whole);
    merge(this.target, elements(tokens, env), this.settled);
    const blocks = tokens.filter((token) => token.level === 0 && token.nesting >= 0 && token.map);
    if (!end && blocks.length > 2) { // the last may still change into a part of the one before
      this.offset += startOfLine(rest, blocks[blocks.length - 2].map[0]);
      this.settled += blocks.length - 2;
    }
  }

  asItIs(text) {
    if (!this.plain) {
      this.plain = true;
      const whole = document.createElement("div");
      whole.className = "plain";
      whole.append(document.createTextNode(""));
      this.target.replaceChildren(whole);
    }
    grow(this.target.firstChild.firstChild, text);
  }
}

function startOfLine(text, line) {
  let at = 0;
  for (; line > 0; line--) at = text.indexOf("\n", at) + 1;
  return at;
}

function grow(node, text) {
  if (node.data === text) return;
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

/** Make the children of `there`, from number `from` on, those of `fresh`. */
function merge(there, fresh, from = 0) {
  let index = from;
  for (const node of [...fresh.childNodes]) {
    const old = there.childNodes[index++];
    if (!old) there.append(node);
    else if (old.nodeName !== node.nodeName || !sameAttributes(old, node)) old.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) grow(old, node.data);
    else merge(old, node);
  }
  while (there.childNodes.length > index) there.lastChild.remove();
}

function sameAttributes(one, other) {
  if (one.nodeType !== Node.ELEMENT_NODE) return true;
  const names = one.getAttributeNames();
  return names.length === other.getAttributeNames().length
    && names.every((name) => one.getAttribute(name) === other.getAttribute(name));
}
