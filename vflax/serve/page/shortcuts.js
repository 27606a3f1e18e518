// Keys. What they are is listed in the help of index.html, too.

import { $ } from "./dom.js";

// By place on the keyboard, for Alt writes other characters on some.
const WITH_ALT = {
  KeyC: "copy",
  KeyI: "add",
  KeyL: "list",
  KeyN: "new",
  KeyR: "regenerate",
};

// actions: what each key does, by name; isIdle(): whether the message box is empty and no answer is being written.
export function setUpKeys(actions) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const name = nameOf(event, actions);
    if (!name) return;
    event.preventDefault();
    actions[name]?.();
    if (name === "settings") $("open-settings").click();
    if (name === "help") $("open-help").click();
  });
}

function nameOf(event, actions) {
  const { key, code, target } = event;
  if (event.ctrlKey || event.metaKey) return "";
  if (event.altKey) return code === "KeyP" ? "settings" : WITH_ALT[code];
  if (key === "Escape") return "escape";
  const writes = target.closest?.("input, textarea");
  if (key === "ArrowUp" && target.closest?.("#foot textarea") && actions.isIdle()) return "editLast";
  if (writes) return "";
  return { "/": "write", "?": "help" }[key];
}
