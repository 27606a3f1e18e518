// The open conversation as it is shown: a node for each turn.

import { $, copyFrom, icon, iconButton, make, plural } from "./dom.js";
import { Growing, render } from "./markdown.js";
import { Addresses } from "./pictures.js";

const NEAR = 48; // so many pixels from the end count as being there
const SMALL = 96; // pictures of so many pixels or fewer are shown enlarged, their pixels sharp

export class View {
  #nodes = new Map(); // turn -> node
  #addresses = new Addresses();
  #pictures = new Map();
  #actions;
  #timer = 0;

  // actions: edit(turn), regenerate(), askKey().
  constructor(actions) {
    this.#actions = actions;
    const end = $("to-end");
    $("scroll").addEventListener("scroll", () => (end.hidden = this.isAtEnd()), { passive: true });
    end.onclick = () => this.toEnd();
  }

  // Shows a conversation from its beginning. busy: an answer of it is being written.
  show(turns, pictures, busy) {
    this.#addresses.free();
    this.#nodes.clear();
    this.#pictures = pictures;
    $("turns").replaceChildren(...turns.map((turn) => this.#node(turn, turns, busy)));
    this.toEnd();
  }

  // Draws anew what has changed since: turns are added or removed at the end, and tools come and go.
  update(turns, busy) {
    const stick = this.isAtEnd();
    for (const [turn, node] of this.#nodes) {
      if (turns.includes(turn)) continue;
      node.remove();
      this.#nodes.delete(turn);
    }
    for (const turn of turns) {
      const old = this.#nodes.get(turn);
      if (!old) $("turns").append(this.#node(turn, turns, busy));
      else this.#drawFoot(old, turn, turns, busy);
    }
    if (stick) this.toEnd();
  }

  nodeOf(turn) {
    return this.#nodes.get(turn);
  }

  // What draws an answer while it grows.
  growing(turn) {
    let stick = true;
    const body = this.#nodes.get(turn).querySelector(".body");
    const growing = new Growing(body, () => stick && this.toEnd());
    return {
      show: (text) => {
        stick = this.isAtEnd();
        body.classList.remove("waiting");
        growing.show(text);
      },
      finish: (text) => {
        body.classList.remove("waiting");
        growing.finish(text);
      },
    };
  }

  isAtEnd() {
    const box = $("scroll");
    return box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
  }

  toEnd() {
    $("scroll").scrollTop = $("scroll").scrollHeight;
    $("to-end").hidden = true;
  }

  #node(turn, turns, busy) {
    const mine = turn.role === "user";
    const node = make("article", { className: `turn ${mine ? "user" : "model"}` });
    node.setAttribute("aria-label", mine ? "You" : "Model");
    const body = make("div", { className: mine ? "text" : "body" });
    if (mine) {
      body.textContent = turn.text;
      body.hidden = !turn.text;
      const shown = turn.pictures.map((id, n) => this.#picture(id, n));
      if (shown.length) node.append(make("div", { className: "pictures" }, ...shown));
    } else {
      body.append(render(turn.text));
      body.classList.toggle("waiting", turn.state === "writing" && !turn.text);
    }
    node.append(body, make("div", { className: "foot" }));
    this.#nodes.set(turn, node);
    this.#drawFoot(node, turn, turns, busy);
    return node;
  }

  #picture(id, n) {
    const record = this.#pictures.get(id);
    const name = `Picture ${n + 1}, ${record.width} by ${record.height} pixels`;
    const image = make("img", { src: this.#addresses.of(record), alt: name, ...shownSize(record) });
    image.classList.toggle("small", isSmall(record));
    const button = make("button", { type: "button", className: "picture", title: "Show it large" }, image);
    button.onclick = () => {
      Object.assign($("large"), { src: image.src, alt: name, className: image.className });
      $("viewer").showModal();
    };
    return button;
  }

  #drawFoot(node, turn, turns, busy) {
    const foot = node.querySelector(".foot");
    if (turn.state === "writing") {
      foot.replaceChildren();
      return;
    }
    const tools = make("div", { className: "tools" });
    if (turn.text) {
      const label = turn.role === "user" ? "Copy message" : "Copy answer";
      tools.append(iconButton("copy", label, ({ currentTarget }) => copyFrom(currentTarget, turn.text)));
    }
    if (turn.role === "user" && !busy) tools.append(iconButton("edit", "Edit message", () => this.#actions.edit(turn)));
    if (turn.role === "assistant" && turn === turns.at(-1) && !busy && !turn.problem) {
      tools.append(iconButton("again", "Regenerate answer", () => this.#actions.regenerate()));
    }
    tools.append(...facts(turn));
    foot.replaceChildren(tools);
    if (turn.problem) foot.prepend(this.#problem(turn, turn === turns.at(-1) && !busy));
  }

  #problem({ problem }, canRetry) {
    const box = make("div", { className: "problem" }, icon("alert"), make("p", { textContent: problem.message }));
    box.setAttribute("role", "alert");
    if (!canRetry) return box;
    if (problem.kind === "key") {
      box.append(make("button", { type: "button", textContent: "Enter key", onclick: () => this.#actions.askKey() }));
      return box;
    }
    const retry = make("button", { type: "button", onclick: () => this.#actions.regenerate() });
    box.append(retry);
    clearInterval(this.#timer);
    const tick = () => {
      const left = Math.ceil((problem.until - Date.now()) / 1000);
      retry.disabled = left > 0;
      retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left <= 0 || !retry.isConnected) clearInterval(this.#timer);
    };
    retry.textContent = "Try again";
    if (problem.until > Date.now()) {
      this.#timer = setInterval(tick, 500);
      queueMicrotask(tick);
    }
    return box;
  }
}

const isSmall = ({ width, height }) => Math.max(width, height) <= SMALL;

// In pixels of the page, known before the picture is loaded: nothing moves then.
function shownSize(record) {
  const { width, height } = record;
  const scale = isSmall(record) ? 128 / Math.max(width, height) : Math.min(1, 300 / width, 260 / height);
  return { width: Math.max(24, width * scale), height: Math.max(24, height * scale) };
}

// What is told below an answer: how it ended, tokens and their pace.
function facts(turn) {
  const told = [];
  if (turn.state === "stopped") told.push("Stopped");
  if (turn.state === "length") told.push("Ended at the most tokens allowed");
  if (turn.usage) told.push(plural(turn.usage.answer, "token", "tokens"));
  if (turn.speed) told.push(`${turn.speed.toFixed(turn.speed < 10 ? 1 : 0)} tokens/s`);
  const title = turn.usage ? `${plural(turn.usage.prompt, "token", "tokens")} were read` : "";
  return told.length ? [make("span", { className: "facts", textContent: told.join(" · "), title })] : [];
}
