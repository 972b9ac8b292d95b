// A page with one table: its columns and rows come with it, and one of its fields has a button for each word.

const DATA = JSON.parse(at("data").textContent);
const ROWS = unpack(DATA.rows);
const HAY = ROWS.map(row => DATA.columns.map(column => row[column.field]).join("\n").toLowerCase());
const SHOW = {words: [], facet: ""};
let TABLE = null;

const times = value => typeof value === "number" ? short(value) : value ?? "";
const share = value => typeof value !== "number" ? value : value === 0 ? "0" : value.toExponential(1).replace(/([+-])(\d)$/, "$10$2");
const WORDS = {
  word: cell, code: value => cell(value, "mono"), idle: value => cell(value, "mono idle"),
  chip: value => value ? chip(value) : "", size: value => cell(size(value), "num"),
  number: value => cell(times(value), "num"), error: value => cell(share(value), "num"),
  count: value => cell(value ? count(value) : "", "num"),
};
const RIGHT = new Set(["size", "number", "error", "count"]);

function shape({title, field, kind, width, wide}, place) {
  const right = RIGHT.has(kind) ? {hozAlign: "right", headerSortStartingDir: "desc"} : {};
  const room = wide || (phone.matches && !place) ? {minWidth: Math.min(width, 150), widthGrow: 1} : {width};
  return {title, field, ...room, ...right, formatter: one => WORDS[kind](one.getValue())};
}

function matches(row) {
  return (!SHOW.facet || row[DATA.facet] === SHOW.facet) && SHOW.words.every(word => HAY[row.at].includes(word));
}

function narrow(change) {
  Object.assign(SHOW, change);
  TABLE.refreshFilter();
  at("shown").textContent = `${count(ROWS.filter(matches).length)} of ${count(ROWS.length)} ${DATA.what}`;
  for (const button of at("chips").children) button.setAttribute("aria-pressed", String(button.textContent === SHOW.facet));
}

function facets() {
  const words = DATA.facet ? [...new Set(ROWS.map(row => row[DATA.facet]))] : [];
  for (const word of words.length > 1 ? words : []) {
    at("chips").append(make("button", {type: "button", "aria-pressed": "false", onclick: () => narrow({facet: SHOW.facet === word ? "" : word})}, word));
  }
}

themeEvents();
facets();
at("search").addEventListener("input", perFrame(() => narrow({words: at("search").value.toLowerCase().split(/\s+/).filter(Boolean)})));
TABLE = virtualTable(at("rows"), ROWS, DATA.columns.filter(column => column.phone || !phone.matches).map(shape));
TABLE.on("tableBuilt", () => {
  TABLE.setFilter(matches);
  narrow({});
  document.documentElement.dataset.ready = "true";
});
