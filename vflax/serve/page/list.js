// The list of conversations.

import { $, iconButton, make } from "./dom.js";
import * as store from "./store.js";

let timer = 0;

// Draws the list. open: id of the conversation that is shown. isBusy(id): whether an answer of it is being written here.
// actions: rename(conversation), remove(conversation), close() of the drawer that the list is in on a phone.
export async function draw(open, isBusy, actions) {
  const all = await store.list();
  const focus = document.activeElement?.dataset.focus; // nodes are made anew, and the cursor stays where it was
  $("list").replaceChildren(...all.map((conversation) => item(conversation, open, isBusy, actions)));
  $("none").hidden = all.length > 0;
  if (focus) [...$("list").querySelectorAll("[data-focus]")].find((node) => node.dataset.focus === focus)?.focus();
}

// Soon, once for many calls: another tab saves twice a second while it writes.
export function drawSoon(draw) {
  clearTimeout(timer);
  timer = setTimeout(draw, 250);
}

function item(conversation, open, isBusy, actions) {
  const { id, title } = conversation;
  const link = make("a", { href: `#c=${id}`, title, onclick: actions.close }, make("span", { textContent: title }));
  if (id === open) link.setAttribute("aria-current", "page");
  if (isBusy(id)) link.classList.add("busy");
  const rename = iconButton("edit", `Rename “${title}”`, () => actions.rename(conversation));
  const remove = iconButton("bin", `Delete “${title}”`, () => actions.remove(conversation));
  for (const [name, node] of Object.entries({ link, rename, remove })) node.dataset.focus = `${name} ${id}`;
  return make("li", {}, link, rename, remove);
}
