// The graph's text before and after a pass, as a diff: lines are matched by the node or input that they are of.

let TEXTS = null;   // {keys, lines, after}, unpacked when first looked at
let LINE_TABLE = null;
const PASS = {number: -1, all: false, words: ""};
const CONTEXT = 1;

async function unpackTexts() {
  const packed = at("pass-texts").textContent.trim();
  if (!packed) return null;
  const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function passView() {
  if (PASS.number >= 0) return LINE_TABLE?.redraw();
  for (const button of document.querySelectorAll(".pass")) button.addEventListener("click", () => showPass(Number(button.dataset.pass)));
  PASS.number = 0;
  TEXTS ??= await unpackTexts();
  if (!TEXTS) return at("texts").append(make("p", {class: "bar note"}, "The texts of this graph were not kept: see the report of one example, mp.report(*example)."));
  at("texts").append(passBar(), make("div", {class: "lines-table"}));
  const first = TEXTS.after.findIndex((text, i) => i > 0 && text);
  showPass(Math.max(0, first - 1));
}

function passBar() {
  const search = make("input", {type: "search", placeholder: "Lines with…", "aria-label": "Show only lines with these words", autocomplete: "off"});
  search.addEventListener("input", perFrame(() => { PASS.words = search.value.toLowerCase(); showPass(PASS.number); }));
  const all = make("input", {type: "checkbox", id: "all-lines", onchange: () => { PASS.all = all.checked; showPass(PASS.number); }});
  return make("div", {class: "bar"}, make("h2", {id: "pass-title"}), search, make("label", {for: "all-lines"}, all, " all lines"), make("output", {id: "pass-said", class: "note", "aria-live": "polite"}));
}

/** The text after pass `number` (-1: as given): [[key, line], …]. */
function textAfter(number) {
  let stage = number + 1;
  while (!TEXTS.after[stage]) stage--;
  const flat = TEXTS.after[stage], pairs = [];
  for (let i = 0; i < flat.length; i += 2) pairs.push([flat[i], flat[i + 1]]);
  return pairs;
}

/** Rows {mark, key, text}: lines that went, that came and that stayed, in the order of the text after. */
function differences(before, after) {
  const old = new Map(before), kept = new Set(after.map(([key]) => key)), rows = [];
  const add = (mark, key, line) => rows.push({at: rows.length, mark, key, text: `${mark} ${TEXTS.lines[line]}`});
  let from = 0;
  const gone = () => { for (; from < before.length && !kept.has(before[from][0]); from++) add("-", ...before[from]); };
  for (const [key, line] of after) {
    gone();
    if (from < before.length && before[from][0] === key) from++;
    if (!old.has(key)) add("+", key, line);
    else if (old.get(key) === line) add(" ", key, line);
    else { add("-", key, old.get(key)); add("+", key, line); }
  }
  gone();
  return rows;
}

function showPass(number) {
  PASS.number = number;
  const buttons = [...document.querySelectorAll(".pass")];
  buttons.forEach((button, i) => button.setAttribute("aria-current", String(i === number)));
  if (!TEXTS) return;
  const rows = differences(textAfter(number - 1), textAfter(number));
  const came = rows.filter(row => row.mark === "+").length, went = rows.filter(row => row.mark === "-").length;
  at("pass-title").textContent = buttons[number]?.querySelector(".name").textContent ?? "";
  at("pass-said").textContent = came + went ? `${count(went)} lines before, ${count(came)} after; ${count(rows.length - came - went)} as they were` : "this pass changed nothing";
  drawLines(PASS.words ? rows.filter(row => row.text.toLowerCase().includes(PASS.words)) : PASS.all || !(came + went) ? rows : changedOnly(rows));
}

/** Changed lines with their neighbours; one row says how many were left out in between. */
function changedOnly(rows) {
  const near = new Uint8Array(rows.length);
  rows.forEach((row, i) => { if (row.mark !== " ") near.fill(1, Math.max(0, i - CONTEXT), i + CONTEXT + 1); });
  const shown = [];
  for (let i = 0; i < rows.length; i++) {
    if (near[i]) { shown.push(rows[i]); continue; }
    const start = i;
    while (i + 1 < rows.length && !near[i + 1]) i++;
    shown.push({at: rows.length + start, mark: "…", text: `… ${count(i - start + 1)} lines as they were`});
  }
  return shown;
}

const LINE_KINDS = {"+": "line plus", "-": "line minus", "…": "line gap", " ": "line"};

function drawLines(rows) {
  const longest = rows.reduce((most, row) => Math.max(most, row.text.length), 60);
  LINE_TABLE?.destroy();
  LINE_TABLE = virtualTable(at("texts").querySelector(".lines-table"), rows, [
    {title: "text", field: "text", headerSort: false, width: Math.ceil(longest * 7.3) + 24,
      formatter: one => make("span", {class: LINE_KINDS[one.getData().mark]}, one.getValue())},
  ], {headerVisible: false, rowHeight: 25, layout: "fitData", rowFormatter: row => row.getElement().classList.add(...LINE_KINDS[row.getData().mark].split(" "))});
}
