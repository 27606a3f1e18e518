// A conversation as a JSON file, and back.

import { make, newId } from "./dom.js";
import { dataUrl } from "./pictures.js";

const FORMAT = "vflax-chat-1";
const STATES = ["done", "length", "stopped"];

export async function download({ title, turns }, pictures) {
  const told = [];
  for (const { role, text, state, pictures: ids } of turns) {
    const images = await Promise.all((ids ?? []).map((id) => dataUrl(pictures.get(id).blob)));
    told.push(role === "user" ? { role, text, images } : { role, text, state });
  }
  const blob = new Blob([JSON.stringify({ format: FORMAT, title, turns: told }, null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "chat"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// {title, turns, pictures} of such a file. Throws an Error that names it.
export async function readFile(file) {
  try {
    const { format, title, turns } = JSON.parse(await file.text());
    if (format !== FORMAT || typeof title !== "string" || !Array.isArray(turns) || !turns.length) throw new Error();
    const pictures = new Map();
    const read = [];
    for (const turn of turns) read.push(await readTurn(turn, pictures));
    return { title: title.slice(0, 200) || "Conversation", turns: read, pictures };
  } catch {
    throw new Error(`“${file.name}” is not a conversation that this page has exported.`);
  }
}

async function readTurn({ role, text, images, state }, pictures) {
  if (typeof text !== "string") throw new Error();
  if (role === "assistant") {
    return { role, text, state: STATES.includes(state) ? state : "stopped", problem: null, usage: null, speed: null };
  }
  if (role !== "user" || !Array.isArray(images)) throw new Error();
  const ids = [];
  for (const url of images) {
    const [, type, data] = /^data:(image\/[a-z]+);base64,(.*)$/.exec(url);
    const blob = new Blob([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });
    const { width, height } = await createImageBitmap(blob);
    ids.push(newId());
    pictures.set(ids.at(-1), { id: ids.at(-1), blob, width, height });
  }
  return { role, text, pictures: ids };
}
