"use strict";
// The page is complete without scripts; this one chooses directions and layers, and shows numbers.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");
document.body.classList.add("scripted");

const direction = document.getElementById("direction");
function showDirection() {
  for (const block of all("[data-direction]")) block.hidden = block.dataset.direction !== direction.value;
}
if (direction) {
  direction.addEventListener("change", showDirection);
  showDirection();
}

function text(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(2);
}

// Shades the tokens of a stack by the chosen layer, or by the mean over its layers.
function shade(select) {
  const layers = all("option", select).map((option) => option.text);
  const { low, high } = select.selectedOptions[0].dataset;
  const layer = select.selectedIndex - (layers.length > 1 ? 1 : 0);
  const control = select.closest(".control");
  control.querySelector("[data-end=low]").textContent = text(+low);
  control.querySelector("[data-end=high]").textContent = text(+high);
  for (const token of all(`[data-stack=${select.dataset.shades}] [data-n]`)) {
    const counts = token.dataset.n.split(" ").map(Number);
    const value = layer < 0 ? counts.reduce((a, b) => a + b) / counts.length : counts[layer];
    token.style.setProperty("--f", high > low ? (value - low) / (high - low) : 0);
    token.dataset.v = text(value);
  }
}
for (const select of all("[data-shades]")) {
  select.addEventListener("change", () => shade(select));
  shade(select);
}

const numbers = document.getElementById("numbers");
if (numbers) numbers.addEventListener("change", () => document.body.classList.toggle("numbers", numbers.checked));

// Says what a token took in each layer; null says nothing.
function point(token) {
  for (const other of all(".now")) other.classList.remove("now");
  tip.textContent = "";
  if (!token) return;
  token.classList.add("now");
  const select = document.querySelector(`[data-shades=${token.parentNode.dataset.stack}]`);
  const names = all("option", select).map((option) => option.text).slice(-token.dataset.n.split(" ").length);
  const counts = token.dataset.n.split(" ").map((count, place) => `${names[place]}: ${count}`);
  tip.textContent = `${token.textContent}\n${counts.join("\n")}`;
  const box = token.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(left, 8) + scrollX}px`;
  tip.style.top = `${box.bottom + scrollY + 6}px`;
}
for (const kind of ["pointerover", "click"]) {
  document.addEventListener(kind, (event) => point(event.target.closest("[data-n]")));
}
document.addEventListener("keydown", (event) => {
  const line = document.activeElement.closest(".tokens");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") point(null);
  if (!line || !step) return;
  event.preventDefault();
  const tokens = all("[data-n]", line);
  const sign = getComputedStyle(line).direction === "rtl" ? -1 : 1;
  const now = tokens.findIndex((token) => token.classList.contains("now"));
  point(tokens[now < 0 ? 0 : Math.min(Math.max(now + step * sign, 0), tokens.length - 1)]);
});
