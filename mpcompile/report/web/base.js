"use strict";
// Elements, and numbers in words. Names from models reach the page as text alone: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element: properties that start with "on" are listeners, all others attributes; children are elements or text. */
function make(tag, properties, ...children) {
  return build(document.createElement(tag), properties, children);
}

function draw(tag, properties, ...children) {
  return build(document.createElementNS(SVG, tag), properties, children);
}

function build(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return element;
}

const at = id => document.getElementById(id);
const count = number => number.toLocaleString("en");

function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  const step = bytes < 1e6 ? 1 : bytes < 1e9 ? 2 : 3;
  return `${short(bytes / 1e3 ** step)} ${["", "kB", "MB", "GB"][step]}`;
}

function flops(number) {
  if (!number) return "";
  if (number < 1e3) return `${number}`;
  const step = Math.min(4, Math.floor(Math.log10(number) / 3));
  return `${short(number / 1e3 ** step)} ${["", "k", "M", "G", "T"][step]}`;
}

function seconds(number) {
  if (!number) return "";
  if (number < 1e-8) return "< 0.01 µs";
  const [factor, unit] = number >= 1 ? [1, "s"] : number >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  return `${number < 1e-6 ? Number((number * factor).toPrecision(2)) : short(number * factor)} ${unit}`;
}

const short = number => Number(number.toPrecision(3)).toString();

/** The precision as a word on its colour and pattern. */
const chip = precision => make("span", {class: `chip ${precision}`}, precision);

const shortOp = op => op.replace(/^aten\./, "").replace(/\.default$/, "");

const phone = window.matchMedia("(max-width: 800px)");

/** Run `work` once per frame at most, with the last arguments. */
function perFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; work(); });
  };
}

// An array is a column; else it is words and the number of the word at each place.
function plain(list) {
  return Array.isArray(list) ? list : list.at;
}

function unpack(columns, names = Object.keys(columns)) {
  const lists = names.map(name => [name, columns[name]]);
  const length = lists.length ? plain(lists[0][1]).length : 0;
  const rows = new Array(length);
  for (let at = 0; at < length; at++) rows[at] = {at};
  for (const [name, list] of lists) {
    if (Array.isArray(list)) for (let at = 0; at < length; at++) rows[at][name] = list[at];
    else for (let at = 0; at < length; at++) rows[at][name] = list.words[list.at[at]];
  }
  return rows;
}
