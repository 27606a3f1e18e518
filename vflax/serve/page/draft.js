// A message while it is written: text and pictures. There is one at the foot of the page, and one in the place of an
// earlier message while that is edited.

import { config } from "./api.js";
import { $, clearNotice, iconButton, make, newId, notice } from "./dom.js";
import { prepare } from "./pictures.js";

const drafts = new Map(); // element -> Draft

export class Draft {
  #pictures = []; // {id, blob, width, height}
  #urls = new Map();
  #onSend;
  #others;
  #busy = 0; // files that are being read
  #waits = false; // it is to be sent once they are

  // onSend({text, pictures}): the person sends it. others(): pictures elsewhere in the conversation.
  constructor(onSend, others) {
    this.#onSend = onSend;
    this.#others = others;
    this.node = $("draft").content.firstElementChild.cloneNode(true);
    this.area = this.node.querySelector("textarea");
    this.sendButton = this.node.querySelector(".send");
    this.#listen();
    drafts.set(this.node, this);
  }

  get text() {
    return this.area.value;
  }

  get isEmpty() {
    return !this.text.trim() && this.#pictures.length === 0;
  }

  set(text, pictures) {
    this.area.value = text;
    this.#pictures = [...pictures];
    this.#show();
  }

  clear() {
    this.set("", []);
  }

  // Call it when the node leaves the page.
  remove() {
    drafts.delete(this.node);
    this.clear();
    this.node.remove();
  }

  grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight + 2}px`;
  }

  attach() {
    this.node.querySelector("input[type=file]").click();
  }

  async add(files) {
    clearNotice();
    this.#busy += 1;
    this.#show();
    for (const file of files) {
      const most = config()?.max_images ?? Infinity;
      if (this.#others() + this.#pictures.length >= most) {
        notice(`This server takes at most ${most} pictures in a conversation.`);
        break;
      }
      try {
        this.#pictures.push({ id: newId(), ...(await prepare(file)) });
      } catch (error) {
        notice(error.message);
      }
      this.#show();
    }
    this.#busy -= 1;
    this.#show();
    if (this.#waits && !this.#busy) this.send();
  }

  send() {
    this.#waits = this.#busy > 0;
    if (this.#waits || this.isEmpty || this.sendButton.disabled) return;
    this.#onSend({ text: this.text.trim(), pictures: [...this.#pictures] });
  }

  #listen() {
    const file = this.node.querySelector("input[type=file]");
    this.node.querySelector(".attach").onclick = () => this.attach();
    file.onchange = () => {
      const files = [...file.files];
      file.value = "";
      this.add(files);
      this.area.focus();
    };
    this.sendButton.onclick = () => this.send();
    this.area.oninput = () => this.#show();
    this.area.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      // Keyboards on glass have no Shift+Enter: there Enter is a new line, and the button sends.
      if (matchMedia("(pointer: coarse)").matches) return;
      event.preventDefault();
      this.send();
    };
  }

  #show() {
    this.grow();
    const idle = this.isEmpty || this.#busy > 0;
    this.sendButton.classList.toggle("idle", idle);
    this.sendButton.setAttribute("aria-disabled", String(idle));
    this.node.classList.toggle("reading", this.#busy > 0);
    const gone = [...this.#urls.keys()].filter((id) => !this.#pictures.some((picture) => picture.id === id));
    for (const id of gone) {
      URL.revokeObjectURL(this.#urls.get(id));
      this.#urls.delete(id);
    }
    this.node.querySelector(".thumbs").replaceChildren(...this.#pictures.map((picture, n) => this.#thumb(picture, n)));
  }

  #thumb(picture, n) {
    if (!this.#urls.has(picture.id)) this.#urls.set(picture.id, URL.createObjectURL(picture.blob));
    const name = `picture ${n + 1}`;
    const image = make("img", { src: this.#urls.get(picture.id), alt: name, title: `${picture.width} × ${picture.height}` });
    const remove = iconButton("close", `Remove ${name}`, () => {
      this.#pictures.splice(n, 1);
      this.#show();
      this.area.focus();
    }, "remove");
    return make("li", {}, image, remove);
  }
}

function draftOf(target) {
  const node = target instanceof Element ? target.closest(".draft") : null;
  return drafts.get(node);
}

// Pictures that are pasted or dropped anywhere go to the draft under the pointer or the cursor, else to the main one.
export function catchPictures(main) {
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    // Word processors put a picture of the text beside the text.
    if (!files.length || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    (draftOf(event.target) ?? main).add(files);
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0; // of elements that the pointer has entered and not left
  const end = () => {
    depth = 0;
    document.body.classList.remove("dropping");
  };
  document.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => {
    depth -= 1;
    if (depth <= 0) end();
  });
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault(); // else the browser opens the file
  });
  document.addEventListener("drop", (event) => {
    end();
    if (!hasFiles(event)) return; // text that is dragged into a message
    event.preventDefault();
    (draftOf(event.target) ?? main).add([...event.dataTransfer.files]);
  });
}
