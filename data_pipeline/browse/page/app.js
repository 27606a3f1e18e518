// What comes from the dataset enters the page by textContent and attributes of ours only, never as HTML.
"use strict";

const browse = (() => {
  const IMAGE = 2, SPECIAL = 1, SUPERVISED = 4, CUT = 8;
  const $ = (id) => document.getElementById(id);
  const loaded = new Map(); // task number -> its samples
  let all = { tasks: [], findings: [], page: {} };
  let listed = []; // task numbers, filtered and sorted
  let task = -1, sample = -1;
  let wanted = null; // id of the sample to go to once its task is loaded

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function count(number, one, many) {
    return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
  }

  // A name with places where it may break: after "+", "_" and "/".
  function breakable(name) {
    return name.split(/(?<=[+_/])/).flatMap((part, n) => (n ? [make("wbr", {}), part] : [part]));
  }

  // ------------------------------------------------------------------------------------------------
  // Tasks

  function matches(row, words) {
    const name = row.name.toLowerCase();
    return words.every((word) => name.includes(word) || row.ids.some((id) => id.toLowerCase().includes(word)));
  }

  function list() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const key = $("sort").value;
    const rows = all.tasks;
    listed = [...rows.keys()].filter((i) => matches(rows[i], words));
    if (key !== "name") listed.sort((a, b) => rows[b][key] - rows[a][key] || a - b);
    const of = count(rows.length, "task", "tasks");
    $("matches").textContent = listed.length === rows.length ? of : `${listed.length} of ${of}`;
    $("tasks").replaceChildren(...listed.map(taskItem));
    markTask(false);
  }

  function taskItem(i) {
    const row = all.tasks[i];
    const facts = [`${count(row.words, "word", "words")} an answer`];
    if (row.images !== 1) facts.push(`${row.images} images a sample`);
    if (row.answers !== 1) facts.push(`${row.answers} answers a sample`);
    const more = make("span", { className: "more", textContent: facts.join(" · ") });
    if (row.problems) more.append(make("span", { className: "mark", textContent: ` · ${row.problems} with findings` }));
    const link = make(
      "a", { href: "#t=" + encodeURIComponent(row.name) },
      make("span", { className: "name" }, ...breakable(row.name)),
      make("span", { className: "count", textContent: row.samples.toLocaleString("en") }),
      more,
    );
    link.dataset.task = i;
    return make("li", {}, link);
  }

  function markTask(scroll) {
    for (const link of $("tasks").querySelectorAll("a")) {
      const here = Number(link.dataset.task) === task;
      link.setAttribute("aria-current", String(here));
      if (here && scroll) link.scrollIntoView({ block: "nearest" });
    }
  }

  // ------------------------------------------------------------------------------------------------
  // Samples

  function tokenNode(one, k, at) {
    const kind = one.kinds[k] & 3, text = one.texts[k];
    const node = make("span", { className: "t" });
    if (kind === IMAGE) {
      node.textContent = "▣ image" + (one.image_tokens ? ` × ${one.image_tokens}` : "");
    } else if (text === "") {
      node.textContent = "▁"; // a piece without text: a word border, or a part of a character
    } else {
      text.split("\n").forEach((line, n) => {
        if (n) node.append(make("span", { className: "nl", textContent: "↵" }), "\n");
        node.append(line);
      });
    }
    node.classList.toggle("image", kind === IMAGE);
    node.classList.toggle("special", kind === SPECIAL);
    node.classList.toggle("ghost", kind === 0 && text === "");
    node.classList.toggle("sup", Boolean(one.kinds[k] & SUPERVISED));
    node.classList.toggle("cut", Boolean(one.kinds[k] & CUT));
    node.dataset.info = one.ids.length ? tokenInfo(one, k, at) : segmentInfo(one, k);
    return node;
  }

  function tokenInfo(one, k, at) {
    const supervised = one.kinds[k] & SUPERVISED ? " · supervised" : "", cut = one.kinds[k] & CUT ? " · cut off" : "";
    if ((one.kinds[k] & 3) === IMAGE) return `tokens ${at} to ${at + one.image_tokens - 1} · an image${cut}`;
    return `token ${at} · id ${one.ids[k]} · ${JSON.stringify(one.texts[k])}${supervised}${cut}`;
  }

  function segmentInfo(one, k) {
    const what = ["text", "special", "image"][one.kinds[k] & 3];
    return `${what}${one.kinds[k] & SUPERVISED ? " · supervised" : ""}`;
  }

  function tokensNode(one) {
    if (one.raw) return make("pre", { className: "raw", textContent: one.raw });
    const node = make("div", { className: "tokens" });
    let at = 0;
    one.kinds.forEach((kind, k) => {
      node.append(tokenNode(one, k, at));
      at += (kind & 3) === IMAGE ? one.image_tokens : 1;
    });
    return node;
  }

  function pictureNode(one, k) {
    const picture = one.images[k];
    const name = one.images.length > 1 ? `image ${k + 1}: ` : "";
    if (picture.error) return make("figure", {}, make("span", { className: "badge", textContent: name + picture.error }));
    const words = `${name}${picture.width} × ${picture.height}, ${Math.max(1, Math.round(picture.bytes / 1024))} KB`;
    const image = make("img", { src: picture.file, alt: `Image ${k + 1} of sample ${one.id}`, loading: "lazy" });
    image.classList.toggle("small", Math.max(picture.width, picture.height) <= 128);
    const button = make("button", { type: "button", title: "Enlarge", onclick: () => enlarge(one, k) }, image);
    return make("figure", {}, button, make("figcaption", { textContent: words }));
  }

  function sampleNode(one, n) {
    const head = make("div", { className: "head" }, make("a", { href: "#s=" + encodeURIComponent(one.id), textContent: one.id }));
    head.append(make("span", { textContent: `no. ${one.number}` }));
    if (one.tokens !== null) head.append(make("span", { textContent: `${count(one.tokens, "token", "tokens")}, ${one.supervised} supervised` }));
    if (one.problem) head.append(make("span", { className: "badge", textContent: "dropped: " + one.problem }));
    for (const finding of one.findings) head.append(make("span", { className: "badge", textContent: finding }));
    const pictures = one.images.length ? make("div", { className: "pictures" }, ...one.images.map((_, k) => pictureNode(one, k))) : null;
    const node = make("article", { className: "sample", tabIndex: -1 }, head, make("div", { className: "body" }, pictures, tokensNode(one)));
    node.dataset.id = one.id;
    node.addEventListener("click", () => goTo(n, false));
    return node;
  }

  function show(number) {
    task = number;
    sample = -1;
    markTask(true);
    $("to-findings").removeAttribute("aria-current");
    const row = all.tasks[number];
    document.title = `${row.name} · ${all.page.dataset}`;
    const samples = loaded.get(number);
    const title = make("h2", { textContent: row.name });
    if (!samples) {
      $("main").replaceChildren(title, make("p", { className: "facts", textContent: "Loading ..." }));
      load(number);
      return;
    }
    const facts = `${count(row.samples, "sample", "samples")}, ${samples.length} shown · ${count(row.words, "word", "words")} an answer`;
    $("main").replaceChildren(title, make("p", { className: "facts", textContent: facts }), ...samples.map(sampleNode));
    $("main").scrollTop = 0;
    if (wanted !== null) goTo(row.ids.indexOf(wanted), true);
    wanted = null;
  }

  function load(number) {
    const script = make("script", { src: `data/task-${number}.js` });
    script.onerror = () => {
      if (task === number) $("main").append(make("p", { className: "badge", textContent: `data/task-${number}.js cannot be read: make the page again` }));
    };
    document.head.append(script);
  }

  function goTo(n, scroll) {
    const nodes = $("main").querySelectorAll(".sample");
    if (n < 0 || n >= nodes.length) return;
    nodes.forEach((node, k) => node.classList.toggle("now", k === n));
    sample = n;
    if (scroll) {
      nodes[n].scrollIntoView({ block: "start" });
      nodes[n].focus({ preventScroll: true });
    }
  }

  function enlarge(one, k) {
    const picture = one.images[k];
    if (!picture || picture.error) return;
    const big = $("large");
    big.src = picture.file;
    big.alt = `Image ${k + 1} of sample ${one.id}`;
    big.classList.toggle("small", Math.max(picture.width, picture.height) <= 128);
    $("caption").textContent = `${one.id}: image ${k + 1} of ${one.images.length}, ${picture.width} × ${picture.height}`;
    const step = (by) => enlarge(one, (k + by + one.images.length) % one.images.length);
    $("picture").onkeydown = (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") step(event.key === "ArrowRight" ? 1 : -1);
      event.stopPropagation();
    };
    if (!$("picture").open) $("picture").showModal();
  }

  // ------------------------------------------------------------------------------------------------
  // Findings

  function showFindings() {
    task = -1;
    sample = -1;
    markTask(false);
    $("to-findings").setAttribute("aria-current", "page");
    const words = { quarantine: "left out at conversion", findings: "kept, but odd" };
    const nodes = all.findings.map((group) => make(
      "details", {},
      make("summary", { textContent: `${group.reason}: ${group.count.toLocaleString("en")} ${words[group.kind]}` }),
      make("div", { className: "scroll" }, make("table", {}, ...group.lines.map(findingRow))),
      group.count > group.lines.length ? make("p", { className: "facts", textContent: `The first ${group.lines.length}; all are in ${group.kind}/${all.page.split}.jsonl` }) : null,
    ));
    const none = make("p", { className: "facts", textContent: "The dataset has no list of samples that were left out or odd." });
    $("main").replaceChildren(make("h2", { textContent: "Findings of the conversion" }), ...(nodes.length ? nodes : [none]));
    $("main").scrollTop = 0;
  }

  function findingRow(line) {
    const drawn = all.tasks.some((row) => row.ids.includes(line.id));
    const id = drawn ? make("a", { href: "#s=" + encodeURIComponent(line.id), textContent: line.id }) : line.id;
    return make("tr", {}, make("td", {}, id), make("td", { textContent: line.task }), make("td", { textContent: line.file }), make("td", { textContent: line.detail }));
  }

  // ------------------------------------------------------------------------------------------------
  // Ways around

  function decoded(text) {
    try { return decodeURIComponent(text); } catch { return text; }
  }

  function route() {
    const [key, value] = [location.hash.slice(1, 3), decoded(location.hash.slice(3))];
    $("side").classList.remove("open");
    $("menu").setAttribute("aria-expanded", "false");
    if (location.hash === "#findings") return showFindings();
    const rows = all.tasks;
    let number = 0;
    if (key === "t=") number = rows.findIndex((row) => row.name === value);
    if (key === "s=") {
      number = rows.findIndex((row) => row.ids.includes(value));
      wanted = value;
    }
    if (number >= 0) return show(number);
    wanted = null;
    task = -1;
    markTask(false);
    const what = key === "s=" ? `Sample ${value} is not among those shown; python -m data_pipeline.browse --ids=... shows it.` : `There is no task ${value}.`;
    $("main").replaceChildren(make("p", { textContent: what }));
  }

  function stepTask(by) {
    const next = listed[listed.indexOf(task) + by];
    if (next !== undefined) location.hash = "t=" + encodeURIComponent(all.tasks[next].name);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const typing = event.target.tagName === "INPUT";
    const actions = {
      ArrowDown: () => (typing ? stepTask(1) : goTo(sample + 1, true)),
      ArrowUp: () => (typing ? stepTask(-1) : goTo(sample - 1, true)),
      ArrowRight: () => stepTask(1),
      ArrowLeft: () => stepTask(-1),
      "/": () => {
        $("side").classList.add("open");
        $("filter").focus();
      },
      b: () => $("borders").click(),
      Enter: () => enlarge(loaded.get(task)[sample], 0),
      Escape: () => $("main").focus(),
    };
    const usual = typing ? ["ArrowDown", "ArrowUp", "Escape"] : Object.keys(actions);
    if (!usual.includes(event.key)) return;
    // Enter on a link or button is theirs.
    if (event.key === "Enter" && (sample < 0 || task < 0 || ["A", "BUTTON", "SUMMARY"].includes(event.target.tagName))) return;
    event.preventDefault();
    actions[event.key]();
  }

  function onToken(event) {
    const node = event.target.closest(".tokens .t");
    if (!node) return;
    document.querySelectorAll(".t.at").forEach((other) => other.classList.remove("at"));
    node.classList.add("at");
    $("info").textContent = node.dataset.info;
  }

  function stored(value) {
    // Some browsers keep nothing for a page from disk.
    try {
      if (value !== undefined) localStorage.setItem("theme", value);
      return localStorage.getItem("theme");
    } catch { return null; }
  }

  function start() {
    const root = document.documentElement;
    if (stored()) root.dataset.theme = stored();
    $("theme").onclick = () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      stored(root.dataset.theme);
    };
    $("borders").onclick = () => {
      const on = document.body.classList.toggle("borders");
      $("borders").setAttribute("aria-pressed", String(on));
    };
    $("menu").onclick = () => {
      const open = $("side").classList.toggle("open");
      $("menu").setAttribute("aria-expanded", String(open));
    };
    $("filter").oninput = $("sort").onchange = list;
    $("close").onclick = $("large").onclick = () => $("picture").close();
    addEventListener("hashchange", route);
    addEventListener("keydown", onKey);
    $("main").addEventListener("pointerover", onToken);
    $("main").addEventListener("click", onToken);
  }

  start();
  return {
    // Called by the data files, see site.py.
    tasks(_, data) {
      all = data;
      const found = data.findings.reduce((sum, group) => sum + group.count, 0);
      $("to-findings").textContent = found ? `Findings (${found.toLocaleString("en")})` : "Findings";
      list();
      route();
    },
    task(number, samples) {
      loaded.set(number, samples);
      if (task === number) show(number);
    },
  };
})();
