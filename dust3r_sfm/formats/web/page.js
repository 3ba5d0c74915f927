"use strict";
// Helpers of all pages. Text is only ever set as text: an image's name may look like markup.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");
const errors = [];
window.addEventListener("error", (event) => {
  errors.push(event.message);
  document.body.dataset.errors = errors.join(" | ");
});

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const count = (number) => number === null ? "?" : number.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

// A row of buttons of which one is on; `act` is told its name.
function choice(names, act) {
  const buttons = names.map((name) => el("button", { type: "button", onclick: () => turn(name) }, name));
  function turn(name) {
    buttons.forEach((button) => button.classList.toggle("on", button.textContent === name));
    act(name);
  }
  buttons[0].classList.add("on");
  return el("div", { class: "choice" }, buttons);
}

function check(text, on, act) {
  const box = el("input", { type: "checkbox", onchange: () => act(box.checked) });
  box.checked = on;
  return el("label", { class: "check" }, box, text);
}

function table(header, rows, numbers = []) {
  const kind = (column) => ({ class: numbers.includes(column) ? "number" : null });
  const head = el("tr", {}, header.map((text, i) => el("th", kind(i), text)));
  return el("table", {}, el("thead", {}, head),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", kind(i), cell))))));
}

// Horizontal bars for [label, value, text].
function bars(rows) {
  const top = Math.max(...rows.map((row) => row[1]), 1e-9);
  const cells = rows.flatMap(([label, value, text]) => [
    el("span", {}, label),
    el("div", { class: "bar" }, el("i", { style: `width:${(100 * value) / top}%` })),
    el("span", {}, text),
  ]);
  return el("div", { class: "bars" }, cells);
}

function notes(lines) {
  return lines.map((line) => el("p", { class: "note" }, line));
}
