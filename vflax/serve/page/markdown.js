// An answer's markdown to nodes. What the model writes is untrusted: its HTML is shown as text, and what marked makes of
// the rest goes through DOMPurify with a short list of tags.

import { icon, make } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";

const purify = globalThis.DOMPurify;
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "input", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const ATTRIBUTES = ["align", "checked", "class", "disabled", "href", "start", "title", "type"];

function escape(text) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (mark) => names[mark]);
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text.trim()).replaceAll("\n", "<br>")}</p>` : escape(text)),
    // Nothing is loaded from other hosts: a picture becomes a link to it.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    if (!/^(https?:|mailto:)/i.test(node.getAttribute("href") ?? "")) node.removeAttribute("href");
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  if (node.tagName === "INPUT") {
    node.setAttribute("type", "checkbox"); // of a list of tasks
    node.setAttribute("disabled", "");
  }
  if (node.className && !/^language-[\w+#.-]+$/.test(node.className)) node.removeAttribute("class");
});

// Text as a fragment of clean nodes.
export function render(text) {
  return clean(marked.parse(text));
}

function clean(html) {
  const nodes = purify.sanitize(html, {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true,
  });
  nodes.querySelectorAll("pre").forEach(addBar);
  nodes.querySelectorAll("table").forEach((table) => {
    const box = make("div", { className: "wide", tabIndex: 0 });
    table.replaceWith(box);
    box.append(table);
  });
  return nodes;
}

// A line above a block of code: its language, and a button that copies it (see app.js for what a click does).
function addBar(pre) {
  const language = pre.querySelector("code")?.className.replace("language-", "") ?? "";
  const button = make("button", { type: "button", className: "quiet", title: "Copy code" }, icon("copy"));
  button.dataset.copy = "code";
  button.setAttribute("aria-label", "Copy code");
  const bar = make("div", { className: "bar" }, make("span", { textContent: language }), button);
  const box = make("div", { className: "code" });
  pre.tabIndex = 0; // it scrolls sideways
  pre.replaceWith(box);
  box.append(bar, pre);
}

// An answer that grows. Blocks that are complete are drawn once; only the last one is drawn again as it grows, once a frame
// at most, and less often where drawing it takes long.
export class Growing {
  #node;
  #drawn = 0; // characters in blocks that are complete
  #tail = [];
  #text = "";
  #frame = 0;
  #rest = 0; // no drawing before this time
  #onDraw;

  // The node is emptied; onDraw() is called after each drawing.
  constructor(node, onDraw) {
    node.replaceChildren();
    this.#node = node;
    this.#onDraw = onDraw;
  }

  show(text) {
    this.#text = text.replace(/\r\n?/g, "\n"); // as the lexer does: it counts characters after that
    this.#frame ||= requestAnimationFrame(() => this.#tick());
  }

  // The whole text, drawn from its beginning: a link's address may stand below it.
  finish(text) {
    cancelAnimationFrame(this.#frame);
    const whole = make("div", {}, render(text));
    if (whole.innerHTML !== this.#node.innerHTML) this.#node.replaceChildren(...whole.childNodes);
  }

  #tick() {
    if (!this.#node.isConnected) return; // another conversation is shown
    const start = performance.now();
    if (start < this.#rest) {
      this.#frame = requestAnimationFrame(() => this.#tick());
      return;
    }
    this.#frame = 0;
    this.#draw();
    this.#onDraw();
    this.#rest = start + 4 * (performance.now() - start);
  }

  #draw() {
    this.#tail.forEach((node) => node.remove());
    const blocks = marked.lexer(this.#text.slice(this.#drawn));
    const last = blocks.findLastIndex((block) => block.type !== "space");
    const complete = blocks.slice(0, Math.max(0, last));
    this.#node.append(clean(marked.parser(complete)));
    this.#drawn += complete.reduce((sum, block) => sum + block.raw.length, 0);
    const tail = clean(marked.parser(blocks.slice(Math.max(0, last))));
    this.#tail = [...tail.childNodes];
    this.#node.append(tail);
  }
}
