// Examples for a conversation that has not begun.

import { $, make } from "./dom.js";

// Fills the gallery; onPick({picture: File, question}) is called for the one that is chosen.
export async function fill(onPick) {
  const response = await fetch("page/examples/examples.json");
  const examples = await response.json();
  $("examples").replaceChildren(...examples.map((example) => make("li", {}, card(example, onPick))));
}

function card({ picture, about, question }, onPick) {
  const image = make("img", { src: `page/examples/${picture}`, alt: about, className: "small" });
  const button = make("button", { type: "button" }, image, make("span", { textContent: question }));
  button.onclick = async () => {
    const blob = await (await fetch(image.src)).blob();
    onPick({ picture: new File([blob], picture, { type: blob.type }), question });
  };
  return button;
}
