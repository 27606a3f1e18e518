// Conversations and their pictures, kept in this browser (IndexedDB).
//
// A conversation is {id, title, named, created, updated, revision, turns}. Turns of the user are {role, text, pictures},
// pictures being ids; those of the model {role, text, state, problem, usage, speed}. Pictures are {id, conversation, blob,
// width, height}, kept apart so that saving an answer as it grows does not write them again.

import { newId } from "./dom.js";

const NAME = "vflax-chat";
const channel = new BroadcastChannel(NAME);
let database = null;

// Another tab has saved this conversation since it was read here.
export class Conflict extends Error {}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error("not saved"));
  });
}

export async function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("conversations", { keyPath: "id" });
    request.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("conversation", "conversation");
  };
  database = await done(request);
}

function begin(mode) {
  const transaction = database.transaction(["conversations", "pictures"], mode);
  return [transaction, transaction.objectStore("conversations"), transaction.objectStore("pictures")];
}

// All conversations, the latest first.
export async function list() {
  if (!database) return [];
  const [, conversations] = begin("readonly");
  const all = await done(conversations.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export async function read(id) {
  if (!database) return undefined;
  const [, conversations] = begin("readonly");
  return done(conversations.get(id));
}

// The pictures of a conversation: id -> record.
export async function readPictures(id) {
  if (!database) return new Map();
  const [, , pictures] = begin("readonly");
  const found = await done(pictures.index("conversation").getAll(id));
  return new Map(found.map((record) => [record.id, record]));
}

// Saves a conversation; of `pictures` (id -> record) those that its turns name, and no others, stay.
// Throws Conflict where another tab was faster; does nothing for one that was deleted meanwhile.
export async function save(conversation, pictures = null) {
  if (!database) return;
  const [transaction, conversations, records] = begin("readwrite");
  const end = finished(transaction);
  end.catch(() => {}); // awaited below, but a Conflict leaves before
  const known = await done(conversations.get(conversation.id));
  const before = conversation.revision; // not sooner: a save of this tab may have come between
  if ((known?.revision ?? 0) !== before) {
    transaction.abort();
    if (!known) return;
    throw new Conflict();
  }
  conversation.revision = before + 1;
  conversations.put(conversation);
  if (pictures) {
    const named = new Set(conversation.turns.flatMap((turn) => turn.pictures ?? []));
    const kept = await done(records.index("conversation").getAllKeys(conversation.id));
    kept.filter((id) => !named.has(id)).forEach((id) => records.delete(id));
    const fresh = [...named].filter((id) => !kept.includes(id) && pictures.has(id));
    fresh.forEach((id) => records.put({ ...pictures.get(id), conversation: conversation.id }));
  }
  try {
    await end;
  } catch (error) {
    conversation.revision = before;
    throw error;
  }
  channel.postMessage({ kind: "saved", id: conversation.id });
}

export async function remove(id) {
  if (!database) return;
  const [transaction, conversations, pictures] = begin("readwrite");
  conversations.delete(id);
  for (const key of await done(pictures.index("conversation").getAllKeys(id))) pictures.delete(key);
  await finished(transaction);
  channel.postMessage({ kind: "removed", id });
}

// Gives a conversation and its pictures new ids, so that saving it leaves the one that is kept as it is.
export function fork(conversation, pictures) {
  const records = [...pictures.values()];
  const ids = new Map(records.map((record) => [record.id, newId()]));
  pictures.clear();
  for (const record of records) pictures.set(ids.get(record.id), { ...record, id: ids.get(record.id) });
  for (const turn of conversation.turns) if (turn.pictures) turn.pictures = turn.pictures.map((id) => ids.get(id));
  Object.assign(conversation, { id: newId(), revision: 0 });
}

// Calls onSaved(id) and onRemoved(id) for what other tabs do, and answers them for the conversations in `mine`
// (anything with has(id)) that their answers are being written here.
export function listen({ onSaved, onRemoved, mine }) {
  channel.addEventListener("message", ({ data }) => {
    if (data.kind === "saved") onSaved(data.id);
    if (data.kind === "removed") onRemoved(data.id);
    if (data.kind === "who" && mine.has(data.id)) channel.postMessage({ kind: "writing", id: data.id });
  });
}

// Whether another tab says that it writes an answer of this conversation.
export function writtenElsewhere(id) {
  return new Promise((resolve) => {
    const hear = ({ data }) => data.kind === "writing" && data.id === id && end(true);
    const timer = setTimeout(() => end(false), 400);
    function end(found) {
      clearTimeout(timer);
      channel.removeEventListener("message", hear);
      resolve(found);
    }
    channel.addEventListener("message", hear);
    channel.postMessage({ kind: "who", id });
  });
}
