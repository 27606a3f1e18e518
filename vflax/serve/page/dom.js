// Small helpers for what every part of the page does.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  const use = document.createElementNS(namespace, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// A button with a picture; its name is read aloud and shown under the pointer.
export function iconButton(name, label, onclick, className = "quiet") {
  const button = make("button", { type: "button", className, title: label, onclick }, icon(name));
  button.setAttribute("aria-label", label);
  return button;
}

// Read aloud, not shown.
export function announce(text) {
  $("announcer").textContent = text;
}

// Shown above the message box until it is closed or the next one comes.
export function notice(text) {
  const close = iconButton("close", "Close this notice", () => $("notices").replaceChildren());
  $("notices").replaceChildren(make("div", { className: "notice" }, make("span", { textContent: text }), close));
}

export function clearNotice() {
  $("notices").replaceChildren();
}

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID is not there on plain http
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function plural(number, one, many) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// Asks in a dialog: for a text where `field` names one, else for a yes. Gives the text, or true; null: cancelled.
export function askUser({ title, text = "", field = "", value = "", type = "text", button, danger = false }) {
  const dialog = $("question");
  const input = $("question-field");
  $("question-title").textContent = title;
  $("question-text").textContent = text;
  $("question-label").textContent = field;
  $("question-input").hidden = !field;
  Object.assign(input, { type, value });
  const yes = $("question-yes");
  yes.textContent = button;
  yes.className = danger ? "danger" : "primary";
  dialog.showModal();
  (field ? input : yes).focus();
  if (field) input.select();
  return new Promise((resolve) => {
    let answer = null;
    $("question-form").onsubmit = (event) => {
      event.preventDefault();
      answer = field ? input.value.trim() : true;
      dialog.close();
    };
    $("question-no").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = ""; // a key does not stay in the document
      resolve(answer);
    };
  });
}

async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Plain http from another machine: browsers hide the clipboard there, and this old way is left.
  const area = make("textarea", { value: text, className: "offscreen" });
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!done) throw new Error("the browser does not let the page copy");
}

// Copies and says so on the button itself.
export async function copyFrom(button, text) {
  const label = button.getAttribute("aria-label") ?? "Copy";
  try {
    await copyText(text);
    flash(button, "check", "Copied");
  } catch {
    flash(button, "close", "The browser does not let the page copy");
  }
  function flash(node, name, words) {
    node.replaceChildren(icon(name));
    node.title = words;
    announce(words);
    setTimeout(() => {
      node.replaceChildren(icon("copy"));
      node.title = label;
    }, 1500);
  }
}
