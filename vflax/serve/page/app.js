// The page: which conversation is open, and what the person's doings do to it.
//
// A talk is {conversation, pictures, job}: a conversation of store.js, its pictures (id -> record), and the answer that is
// being written, {turn, controller}, or null. Answers go on while another conversation is open.

import { emptyAnswer, write } from "./answer.js";
import { config, readConfig } from "./api.js";
import { $, announce, askUser, clearNotice, copyFrom, make, newId, notice, plural } from "./dom.js";
import { catchPictures, Draft } from "./draft.js";
import * as gallery from "./gallery.js";
import * as list from "./list.js";
import * as settings from "./settings.js";
import { setUpKeys } from "./shortcuts.js";
import * as store from "./store.js";
import { download, readFile } from "./transfer.js";
import { View } from "./view.js";

const NARROW = "(max-width: 760px)"; // as in style.css
const SAVE_EVERY = 500; // ms, while an answer grows
const running = new Map(); // id -> talk with a job
let talk = newTalk();
let editor = null; // {turn, draft}: an earlier message that is edited
let opening = 0;

const view = new View({ edit, regenerate, askKey });
const composer = new Draft(send, () => countPictures(talk.conversation.turns));

function newTalk() {
  const now = Date.now();
  const title = "New conversation";
  const conversation = { id: newId(), title, named: false, created: now, updated: now, revision: 0, turns: [] };
  return { conversation, pictures: new Map(), job: null };
}

function countPictures(turns) {
  return turns.reduce((sum, turn) => sum + (turn.pictures?.length ?? 0), 0);
}

// ---------------------------------------------------------------------------------------------------------
// Which conversation is open

function openFromAddress() {
  return open(/^#c=(\w+)$/.exec(location.hash)?.[1]);
}

async function open(id) {
  const turn = ++opening;
  const next = (await find(id)) ?? newTalk();
  if (turn !== opening) return; // another one was chosen meanwhile
  closeEditor();
  clearNotice();
  talk = next;
  showList(false);
  view.show(talk.conversation.turns, talk.pictures, Boolean(talk.job));
  if (talk.job) {
    talk.job.growing = view.growing(talk.job.turn);
    if (talk.job.turn.text) talk.job.growing.show(talk.job.turn.text);
  }
  refresh();
  focusComposer();
  if (id && !talk.conversation.revision) notice("This conversation is not kept in this browser.");
}

async function find(id) {
  if (!id) return null;
  if (running.has(id)) return running.get(id);
  const conversation = await store.read(id);
  if (!conversation) return null;
  const found = { conversation, pictures: await store.readPictures(id), job: null };
  const last = conversation.turns.at(-1);
  if (last?.state === "writing" && !(await store.writtenElsewhere(id))) {
    last.state = "stopped"; // its tab was closed
    try {
      await store.save(conversation);
    } catch (error) {
      if (error instanceof store.Conflict) return find(id); // another tab has found it, too
    }
  }
  return found;
}

// Not on glass, where the keyboard would come up.
function focusComposer() {
  if (matchMedia("(pointer: fine)").matches) composer.area.focus();
}

function openNew() {
  if (location.hash) history.pushState(null, "", location.pathname);
  return open();
}

async function keep(one, pictures = null) {
  one.conversation.updated = Date.now();
  try {
    await store.save(one.conversation, pictures);
  } catch (error) {
    if (error instanceof store.Conflict) await keepCopy(one);
    else notice(`This browser could not keep the conversation (${error.message}). Export it, or delete old ones.`);
  }
}

// Another tab has changed the conversation: this tab's goes on under a name of its own.
async function keepCopy(one) {
  const { conversation, pictures } = one;
  running.delete(conversation.id);
  store.fork(conversation, pictures);
  conversation.title += " (copy)";
  if (one.job) running.set(conversation.id, one);
  await store.save(conversation, pictures);
  if (one !== talk) return;
  history.replaceState(null, "", `#c=${conversation.id}`);
  notice("Another tab has changed this conversation. Yours goes on as a copy.");
}

// Draws what depends on the state of the open conversation.
function refresh() {
  const { conversation, job } = talk;
  const empty = conversation.turns.length === 0;
  $("welcome").hidden = !empty;
  $("title").textContent = empty ? "New conversation" : conversation.title;
  document.title = empty ? "Chat · vflax" : `${conversation.title} · vflax`;
  $("export").disabled = empty;
  document.body.classList.toggle("answering", Boolean(job));
  composer.sendButton.disabled = Boolean(job);
  drawList();
}

function drawList() {
  return list.draw(talk.conversation.id, (id) => running.has(id), { rename, remove, close: () => showList(false) });
}

// ---------------------------------------------------------------------------------------------------------
// Questions and answers

async function send({ text, pictures }) {
  if (talk.job || !(await isOurs())) return;
  composer.clear();
  closeEditor();
  focusComposer(); // the button that had the focus is not there now
  await askWith(text, pictures);
}

// False where another tab writes an answer of the open conversation.
async function isOurs() {
  const { conversation } = talk;
  const last = conversation.turns.at(-1);
  if (last?.state !== "writing" || talk.job) return true;
  if (await store.writtenElsewhere(conversation.id)) {
    notice("An answer of this conversation is being written in another tab.");
    return false;
  }
  last.state = "stopped";
  return true;
}

async function askWith(text, pictures) {
  const { conversation } = talk;
  for (const picture of pictures) talk.pictures.set(picture.id, picture);
  conversation.turns.push({ role: "user", text, pictures: pictures.map(({ id }) => id) });
  if (!conversation.named && countQuestions(conversation) === 1) conversation.title = titleOf(text);
  await answer();
}

function countQuestions({ turns }) {
  return turns.filter((turn) => turn.role === "user").length;
}

function titleOf(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "A picture";
}

// Writes an answer below the open conversation. before: the answer that it takes the place of; it stays where the new one
// fails before its first word.
async function answer(before = null) {
  const mine = talk;
  const { conversation, pictures } = mine;
  const turn = emptyAnswer();
  const asked = [...conversation.turns];
  conversation.turns.push(turn);
  const job = { turn, controller: new AbortController(), growing: null };
  mine.job = job;
  running.set(conversation.id, mine);
  clearNotice();
  view.update(conversation.turns, true);
  view.toEnd();
  job.growing = view.growing(turn);
  history.replaceState(null, "", `#c=${conversation.id}`);
  await keep(mine, pictures);
  refresh();
  announce("The answer is being written.");

  let saved = performance.now();
  await write(turn, asked, pictures, job.controller.signal, () => {
    if (talk === mine) job.growing.show(turn.text);
    if (performance.now() - saved < SAVE_EVERY) return;
    saved = performance.now();
    keep(mine);
  });
  if (!turn.text && before?.text) Object.assign(turn, before, { problem: turn.problem });
  mine.job = null;
  running.delete(conversation.id);
  if (talk === mine) showEnd(turn, job);
  await keep(mine, pictures);
  if (talk === mine) refresh();
  else drawList();
}

function showEnd(turn, job) {
  const stick = view.isAtEnd();
  job.growing.finish(turn.text);
  view.update(talk.conversation.turns, false);
  if (stick) view.toEnd();
  refresh();
  if (turn.problem) {
    if (turn.problem.kind === "key") askKey();
    return; // it is an alert, which is read aloud by itself
  }
  announce(turn.state === "stopped" ? "Stopped." : `Answer: ${turn.text}`);
}

function stop() {
  talk.job?.controller.abort();
}

async function regenerate() {
  const { turns } = talk.conversation;
  if (talk.job || !turns.length || !(await isOurs())) return;
  closeEditor();
  const before = turns.at(-1).role === "assistant" ? turns.pop() : null;
  focusComposer();
  await answer(before);
}

async function askKey() {
  const text = "The key is kept in this browser and sent to this server only.";
  const key = await askUser({ title: "API key", text, field: "Key", type: "password", button: "Use this key" });
  if (!key) return;
  settings.setKey(key);
  if (talk.conversation.turns.at(-1)?.problem?.kind === "key") await regenerate();
}

// ---------------------------------------------------------------------------------------------------------
// Editing an earlier message

function edit(turn) {
  if (talk.job) return;
  closeEditor();
  const { turns } = talk.conversation;
  const later = turns.length - turns.indexOf(turn) - 1;
  const draft = new Draft((message) => sendEdited(turn, message), () => countPictures(turns.slice(0, turns.indexOf(turn))));
  draft.node.classList.add("editor");
  draft.area.setAttribute("aria-label", "Edited message");
  draft.node.querySelector(".note").textContent = later
    ? `Sending removes ${plural(later, "message", "messages")} after this one.`
    : "";
  draft.node.querySelector(".cancel").onclick = () => closeEditor(true);
  editor = { turn, draft };
  const node = view.nodeOf(turn);
  node.hidden = true;
  node.after(draft.node);
  draft.set(turn.text, turn.pictures.map((id) => talk.pictures.get(id)).filter(Boolean));
  draft.area.focus();
}

async function sendEdited(turn, { text, pictures }) {
  if (talk.job || !(await isOurs())) return;
  const { turns } = talk.conversation;
  turns.splice(turns.indexOf(turn));
  closeEditor();
  view.update(turns, true);
  focusComposer();
  await askWith(text, pictures);
}

function closeEditor(focus = false) {
  if (!editor) return;
  const node = view.nodeOf(editor.turn);
  editor.draft.remove();
  editor = null;
  if (node) node.hidden = false;
  if (focus) focusComposer();
}

function editLast() {
  const last = talk.conversation.turns.findLast((turn) => turn.role === "user");
  if (last) edit(last);
}

function copyLast() {
  const last = talk.conversation.turns.findLast((turn) => turn.role === "assistant" && turn.text);
  const button = last && view.nodeOf(last).querySelector(".tools button");
  if (button) copyFrom(button, last.text);
}

// ---------------------------------------------------------------------------------------------------------
// Conversations: name, delete, export, import

async function rename({ id, title }) {
  const wanted = await askUser({ title: "Rename", field: "Title", value: title, button: "Rename" });
  if (!wanted) return;
  const one = talkOf(id) ?? (await find(id));
  if (!one) return;
  Object.assign(one.conversation, { title: wanted.slice(0, 200), named: true });
  await keep(one);
  refresh();
}

function talkOf(id) {
  return id === talk.conversation.id ? talk : running.get(id);
}

async function remove({ id, title }) {
  const text = `“${title}” and its pictures are removed from this browser.`;
  if (!(await askUser({ title: "Delete this conversation?", text, button: "Delete", danger: true }))) return;
  talkOf(id)?.job?.controller.abort();
  await store.remove(id);
  if (id === talk.conversation.id) await openNew();
  else drawList();
  $("new").focus();
}

async function importFile(file) {
  try {
    const { title, turns, pictures } = await readFile(file);
    const one = newTalk();
    Object.assign(one.conversation, { title, turns, named: true });
    await keep(one, pictures);
    location.hash = `#c=${one.conversation.id}`;
  } catch (error) {
    notice(error.message);
  }
}

// What other tabs do to the open conversation is shown here, unless something of it is under way here.
async function onSavedElsewhere(id) {
  list.drawSoon(drawList);
  if (id !== talk.conversation.id || talk.job || editor) return;
  const mine = talk;
  const [conversation, pictures] = [await store.read(id), await store.readPictures(id)];
  if (!conversation || talk !== mine || mine.job || editor) return;
  const top = view.isAtEnd() ? null : $("scroll").scrollTop;
  talk = { conversation, pictures, job: null };
  view.show(conversation.turns, pictures, false);
  if (top !== null) $("scroll").scrollTop = top;
  refresh();
}

async function onRemovedElsewhere(id) {
  const open = id === talk.conversation.id;
  talkOf(id)?.job?.controller.abort();
  if (!open) return drawList();
  await openNew();
  notice("The conversation was deleted in another tab.");
}

// ---------------------------------------------------------------------------------------------------------
// The start

// What a reload finds again, beside the conversation: how far it was scrolled, and a message that was not sent.
function rememberPlace() {
  for (const one of running.values()) {
    one.job.turn.state = "stopped";
    store.save(one.conversation).catch(() => {});
  }
  const place = { hash: location.hash, top: view.isAtEnd() ? null : $("scroll").scrollTop, text: composer.text };
  settings.write("vflax-place", JSON.stringify(place), "sessionStorage");
}

function findPlace() {
  const place = JSON.parse(settings.read("vflax-place", "sessionStorage") || "{}");
  if (place.hash !== location.hash) return;
  if (place.text) composer.set(place.text, []);
  if (place.top != null) $("scroll").scrollTop = place.top;
}

function setUpControls() {
  const foot = composer.node;
  foot.querySelector(".cancel").remove();
  foot.querySelector(".stop").onclick = stop;
  $("foot").append(foot);
  catchPictures(composer);
  $("new").onclick = openNew;
  $("open-help").onclick = () => $("help").showModal();
  $("export").onclick = () => download(talk.conversation, talk.pictures);
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = ({ target }) => {
    const [file] = target.files;
    target.value = "";
    if (file) importFile(file);
  };
  $("open-list").onclick = toList;
  $("shade").onclick = leaveList;
  $("skip").onclick = () => composer.area.focus();
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // beside it
  }
  document.addEventListener("click", ({ target }) => {
    const button = target.closest?.("[data-copy=code]");
    if (button) copyFrom(button, button.closest(".code").querySelector("code").textContent.replace(/\n$/, ""));
  });
}

// On a narrow screen the list is a drawer over the page.
function showList(shown) {
  document.body.classList.toggle("drawer", shown);
  $("open-list").setAttribute("aria-expanded", String(shown));
  $("page").inert = shown;
}

function toList() {
  showList(matchMedia(NARROW).matches);
  ($("list").querySelector("[aria-current]") ?? $("new")).focus();
}

function leaveList() {
  showList(false);
  $("open-list").focus();
}

// Esc: what is on top goes first.
function escape() {
  if (document.body.classList.contains("drawer")) leaveList();
  else if (editor) closeEditor(true);
  else stop();
}

async function showServer() {
  try {
    await readConfig();
  } catch (error) {
    const again = make("button", { type: "button", textContent: "Try again", onclick: showServer });
    notice(error.message);
    $("notices").firstElementChild.append(again);
    return;
  }
  clearNotice();
  $("model").textContent = config().model;
  settings.showDefaults();
}

async function start() {
  settings.start();
  setUpControls();
  setUpKeys({
    add: () => composer.attach(), copy: copyLast, editLast, escape, isIdle: () => composer.isEmpty && !talk.job,
    list: toList, new: openNew, regenerate, write: () => composer.area.focus(),
  });
  gallery.fill(async ({ picture, question }) => {
    composer.set(question, []);
    await composer.add([picture]);
    composer.area.focus();
  });
  let kept = true;
  await store.open().catch(() => (kept = false));
  store.listen({ onSaved: onSavedElsewhere, onRemoved: onRemovedElsewhere, mine: running });
  addEventListener("hashchange", openFromAddress);
  addEventListener("pagehide", rememberPlace);
  addEventListener("resize", () => composer.grow());
  await openFromAddress();
  findPlace();
  if (!kept) notice("This browser keeps nothing for this page: a conversation is gone when you leave it.");
  await showServer();
  document.body.dataset.ready = "";
}

start();
