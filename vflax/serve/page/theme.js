// Runs before the page is drawn, so that it does not flash in the other colours.
"use strict";

try {
  const chosen = localStorage.getItem("vflax-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing follows the system.
}
