// What comes from the dataset enters the page by textContent and attributes of ours only, never as HTML.
"use strict";

(() => {
  const sheet = JSON.parse(document.getElementById("data").textContent);
  const QUESTIONS = [ // name, words, what a no is about
    ["solved", "Does your answer mean the same as the key?", "answer"],
    ["clear", "Was it clear what to do?", "instruction"],
    ["right", "Is the key right?", "key"],
    ["enough", "Is the picture enough to tell?", "picture"],
  ];
  const $ = (id) => document.getElementById(id);
  let reviewer = "";
  let given = []; // for each sample {answer, shown, solved, clear, right, enough, comment}; null: not said yet
  let at = 0;

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // ------------------------------------------------------------------------------------------------
  // What was entered

  const same = (name) => name.toLowerCase().trim().split(/\s+/).join(" ");
  const kept = () => `vflax-review/${sheet.version}/${same(reviewer)}`;
  const isDone = (one) => one.shown && QUESTIONS.every(([name]) => one[name] !== null);
  const saidNo = (one) => QUESTIONS.filter(([name]) => one[name] === false);

  function save() {
    // A browser may forbid it to pages from disk: then it lasts as long as the page.
    try { localStorage.setItem(kept(), JSON.stringify(given)); } catch { /* nothing to tell */ }
  }

  function restore() {
    const fresh = sheet.samples.map(() => ({ answer: "", shown: false, solved: null, clear: null, right: null, enough: null, comment: "" }));
    try {
      const found = JSON.parse(localStorage.getItem(kept()));
      return Array.isArray(found) && found.length === fresh.length ? found : fresh;
    } catch { return fresh; }
  }

  // An answer by its words; of lettered options the letter, the text, or both.
  function isKey(answer, key) {
    const plain = (text) => (text.toLowerCase().match(/[\p{L}\p{N}.,+-]*[\p{L}\p{N}+-]/gu) ?? []).join(" ");
    const lettered = key.match(/^\(([a-z])\) (.*)$/s);
    const ways = lettered ? [key, lettered[1], lettered[2]] : [key];
    return plain(answer) !== "" && ways.map(plain).includes(plain(answer));
  }

  // ------------------------------------------------------------------------------------------------
  // Three views

  function show(view) {
    for (const id of ["start", "solve", "end"]) $(id).hidden = id !== view;
  }

  function begin(event) {
    event.preventDefault();
    const name = $("name").value.trim();
    if (!same(name)) return;
    if (sheet.authors.includes(same(name))) {
      $("refused").textContent = "You wrote this task; somebody else has to review it.";
      return;
    }
    reviewer = name;
    given = restore();
    $("who").textContent = `Reviewer: ${reviewer}`;
    $("who").hidden = false;
    const first = given.findIndex((one) => !isDone(one));
    first < 0 ? finish() : go(first);
  }

  function go(number) {
    at = Math.max(0, Math.min(number, given.length - 1));
    show("solve");
    const sample = sheet.samples[at], one = given[at];
    $("picture").src = sample.picture;
    $("picture").alt = `Picture of sample ${at + 1}`;
    $("picture").className = sample.small ? "small" : "";
    $("prompt").textContent = sample.prompt;
    $("answer").value = one.answer;
    $("comment").value = one.comment;
    $("key").textContent = sample.answer;
    draw();
    if (!one.shown) $("answer").focus();
  }

  // All of the view that changes while a sample is at hand.
  function draw() {
    const one = given[at];
    $("answer").readOnly = one.shown;
    $("reveal").hidden = one.shown;
    $("rating").hidden = !one.shown;
    $("key").hidden = !one.shown;
    $("previous").disabled = at === 0;
    $("next").textContent = at === given.length - 1 ? "To the end" : "Next";
    $("next").classList.toggle("first", isDone(one));
    const asked = QUESTIONS.find(([name]) => one[name] === null);
    $("questions").replaceChildren(...QUESTIONS.map(([name, words]) => {
      const node = make("div", { className: "question" }, make("span", { textContent: words, id: `q-${name}` }), ...["yes", "no"].map((word) => {
        const button = make("button", { type: "button", className: word, textContent: word === "yes" ? "Yes" : "No", onclick: () => say(name, word === "yes") });
        button.setAttribute("aria-pressed", String(one[name] === (word === "yes")));
        button.setAttribute("aria-describedby", `q-${name}`);
        return button;
      }));
      node.classList.toggle("now", asked !== undefined && asked[0] === name);
      return node;
    }));
    $("samples").replaceChildren(...given.map((each, n) => {
      const state = !isDone(each) ? "open" : saidNo(each).length ? "said no" : "done";
      const button = make("button", { type: "button", textContent: n + 1, onclick: () => go(n) });
      button.className = { open: "", "said no": "bad", done: "good" }[state];
      button.setAttribute("aria-label", `Sample ${n + 1}, ${state}`);
      button.setAttribute("aria-current", String(n === at));
      return button;
    }));
  }

  function reveal(event) {
    event.preventDefault();
    const one = given[at];
    if (one.shown) return;
    one.answer = $("answer").value.trim();
    one.shown = true;
    if (isKey(one.answer, sheet.samples[at].answer)) one.solved = true;
    if (!one.answer) one.solved = false;
    $("answer").blur();
    save();
    draw();
  }

  function say(name, value) {
    given[at][name] = value;
    save();
    draw();
  }

  function next() {
    at === given.length - 1 ? finish() : go(at + 1);
  }

  function finish() {
    show("end");
    const open = given.filter((one) => !isDone(one)).length;
    const solved = given.filter((one) => one.solved).length;
    $("result").textContent = open ? `${open} of ${given.length} samples are not done` : `${solved} of ${given.length} samples solved`;
    $("export").disabled = open > 0;
    $("exported").textContent = open ? "Export needs all of them." : "";
    $("table").tBodies[0].replaceChildren(...given.map((one, n) => {
      const said = isDone(one) ? saidNo(one).map(([, , about]) => about).join(", ") || "–" : "not done";
      const cells = one.shown ? [one.answer || "(none)", sheet.samples[n].answer, said, one.comment] : ["", "", said, ""];
      const row = make("tr", { className: isDone(one) && !saidNo(one).length ? "" : "bad" }, make("td", { textContent: n + 1 }));
      row.append(...cells.map((text) => make("td", { textContent: text })));
      return row;
    }));
    (open ? $("back") : $("export")).focus();
  }

  function download() {
    const samples = given.map(({ shown, ...one }, n) => ({ id: sheet.samples[n].id, key: sheet.samples[n].answer, ...one }));
    const { tool, task, file, data } = sheet;
    const text = JSON.stringify({ tool, task, file, data, reviewer, samples }, null, 1) + "\n";
    const name = `${task}.${same(reviewer).replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    $("exported").textContent = `Saved as ${name}, for: python -m data_pipeline.author accept`;
  }

  // ------------------------------------------------------------------------------------------------
  // Keys

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("solve").hidden) return;
    const typing = event.target.tagName === "INPUT" && !event.target.readOnly;
    const one = given[at];
    if (typing) {
      const leaves = event.key === "Escape" || (event.target === $("comment") && event.key === "Enter");
      if (leaves) {
        event.preventDefault();
        event.target.blur();
      }
      // In an empty box there is nothing that arrows could go through.
      if (event.target.value || !event.key.startsWith("Arrow")) return;
    }
    if (event.key === "ArrowLeft" && at > 0) go(at - 1);
    else if (event.key === "ArrowRight" && at < given.length - 1) go(at + 1);
    else if (event.key === "e") finish();
    else if (one.shown && (event.key === "y" || event.key === "n")) {
      const asked = QUESTIONS.find(([name]) => one[name] === null);
      if (asked) say(asked[0], event.key === "y");
    } else if (one.shown && event.key === "c") $("comment").focus();
    // On a button Enter presses it.
    else if (event.key === "Enter" && one.shown && event.target.tagName !== "BUTTON") {
      if (isDone(one)) next();
      else document.querySelector(".question.now button").focus();
    }
    else return;
    event.preventDefault();
  }

  $("begin").onsubmit = begin;
  $("answering").onsubmit = reveal;
  $("answer").oninput = () => { if (!given[at].shown) { given[at].answer = $("answer").value; save(); } };
  $("comment").oninput = () => { given[at].comment = $("comment").value.trim(); save(); };
  $("previous").onclick = () => go(at - 1);
  $("next").onclick = next;
  $("back").onclick = () => go(Math.max(0, given.findIndex((one) => !isDone(one))));
  $("export").onclick = download;
  addEventListener("keydown", onKey);
  $("name").focus();
})();
