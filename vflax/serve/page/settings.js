// What the person has set, kept in this browser for all conversations: parameters of answers, the key, the colours.

import { config } from "./api.js";
import { $ } from "./dom.js";

const NAMES = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

export function read(name, storage = "localStorage") {
  try {
    return globalThis[storage].getItem(name) ?? "";
  } catch {
    return "";
  }
}

export function write(name, value, storage = "localStorage") {
  try {
    if (value) globalThis[storage].setItem(name, value);
    else globalThis[storage].removeItem(name);
  } catch {
    // It holds until the page is closed.
  }
}

export const key = () => read("vflax-key");
export const setKey = (value) => write("vflax-key", value);

function field(name) {
  return $(`set-${name}`);
}

function stored() {
  try {
    return JSON.parse(read("vflax-parameters") || "{}");
  } catch {
    return {};
  }
}

// The parameters that are set, as the request names them; one that is out of its range is left out.
export function parameters() {
  const values = {};
  for (const name of NAMES) {
    const input = field(name);
    if (input.value !== "" && input.checkValidity()) values[name] = input.valueAsNumber;
  }
  return values;
}

export const systemPrompt = () => field("system").value.trim();

function keep() {
  const valid = NAMES.filter((name) => field(name).value !== "" && field(name).checkValidity());
  const values = Object.fromEntries(valid.map((name) => [name, field(name).value]));
  write("vflax-parameters", JSON.stringify({ ...values, system: field("system").value }));
  mark();
}

// A dot on the button where something is not as the server would have it.
function mark() {
  $("open-settings").classList.toggle("changed", Boolean(systemPrompt()) || Object.keys(parameters()).length > 0);
}

function fill() {
  const values = stored();
  for (const name of [...NAMES, "system"]) field(name).value = values[name] ?? "";
  mark();
}

// Says what the server does where nothing is set.
export function showDefaults() {
  const { defaults, max_length } = config();
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (defaults[name] != null) field(name).placeholder = defaults[name];
  }
  field("max_tokens").max = max_length;
  $("length-note").textContent = `Question and answer together: at most ${max_length.toLocaleString("en")}.`;
}

function dark() {
  return getComputedStyle(document.documentElement).colorScheme === "dark";
}

// The other colours; where those are the system's, it follows the system again.
function switchTheme() {
  const wanted = dark() ? "light" : "dark";
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  write("vflax-theme", wanted === system ? "" : wanted);
  showTheme();
}

function showTheme() {
  const chosen = read("vflax-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-pressed", String(dark()));
}

export function start() {
  fill();
  $("settings-form").addEventListener("input", keep);
  $("settings-form").addEventListener("change", ({ target }) => target.reportValidity());
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("reset").onclick = () => {
    write("vflax-parameters", "");
    fill();
  };
  $("open-settings").onclick = () => {
    $("set-key").value = key();
    $("settings").showModal();
  };
  $("set-key").onchange = () => setKey($("set-key").value.trim());
  $("settings").addEventListener("close", () => {
    setKey($("set-key").value.trim());
    $("set-key").value = ""; // a key does not stay in the document
  });
  $("theme").onclick = switchTheme;
  showTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  addEventListener("storage", ({ key: name }) => {
    if (name === "vflax-theme") showTheme();
    if (name === "vflax-parameters") fill();
  });
}
