// The table of nodes; a phone gets one column whose cells say it all.

let TABLE = null;
let BUILT = false;
let CHOSEN = -1;
let shownOrder = null;

const COLUMNS = [
  {title: "node", field: "id", width: 165, formatter: one => cell(one.getValue(), "mono")},
  {title: "op", field: "op", width: 116, formatter: one => cell(shortOp(one.getValue()), "mono")},
  {title: "was → now", field: "precision", width: 124, formatter: one => precision(one.getData())},
  {title: "verdict", field: "verdict", width: 152, formatter: one => verdict(one.getData())},
  {title: "why", field: "reason", minWidth: 370, widthGrow: 1, formatter: one => cell(one.getValue(), "")},
  number("time", "seconds", seconds), {...number("bytes", "bytes", size), width: 86},
  {title: "where", field: "source", width: 105, formatter: one => cell(one.getValue(), "mono idle")},
  {title: "module", field: "module", width: 170, formatter: one => cell(one.getValue(), "mono idle")},
  {...number("FLOPs", "flops", flops), width: 90},
];
const PHONE = [{title: "nodes", field: "id", widthGrow: 1, formatter: one => card(one.getData())}];

function precision(node) {
  if (node.precision === "keep") return chip("keep");
  return make("span", {}, make("span", {class: "idle"}, `${node.was || "–"} → `), chip(node.precision), DATA.fp8[node.at] ? chip("fp8") : null);
}

const verdict = node => cell(node.decided_by === "rule" ? node.verdict : `${node.verdict}, ${node.decided_by}`, "");

function card(node) {
  return make("span", {class: "lines"},
    make("span", {}, chip(node.precision), " ", make("b", {class: "mono"}, node.id), " ", make("span", {class: "mono idle"}, shortOp(node.op))),
    make("span", {class: "two"}, node.reason));
}

function nodeTable() {
  TABLE?.destroy();
  BUILT = false;
  const narrowScreen = phone.matches;
  const columns = narrowScreen ? PHONE : COLUMNS.filter(one => one.field !== "seconds" || NODES.some(node => node.seconds));
  TABLE = virtualTable(at("nodes"), NODES, columns, {
    rowHeight: narrowScreen ? 68 : 29,
    headerVisible: !narrowScreen,
    rowFormatter: row => dress(row),
  });
  TABLE.on("rowClick", (_, row) => choose(row.getData().at));
  TABLE.on("dataFiltered", () => { shownOrder = null; });
  TABLE.on("dataSorted", () => { shownOrder = null; });
  TABLE.on("tableBuilt", () => {
    const holder = at("nodes").querySelector(".tabulator-tableholder");
    holder.tabIndex = 0;
    holder.setAttribute("aria-label", "Nodes: arrows move, Enter shows the node");
    at("nodes").setAttribute("aria-rowcount", String(NODES.length));
    BUILT = true;
    TABLE.setFilter(node => MASK[node.at] === 1);
    if (CHOSEN >= 0) reveal();
    else followAddress();
    document.documentElement.dataset.ready = "true";
  });
}

/** Marks of a row that has just been drawn. */
function dress(row) {
  const element = row.getElement(), node = row.getData();
  element.id = `row-${node.at}`;
  element.setAttribute("aria-rowindex", String(node.at + 1));
  element.classList.toggle("chosen", node.at === CHOSEN);
  element.setAttribute("aria-selected", String(node.at === CHOSEN));
}

function choose(node, {quiet = false} = {}) {
  const before = CHOSEN;
  CHOSEN = node;
  for (const one of [before, node]) {
    const element = at(`row-${one}`);
    element?.classList.toggle("chosen", one === node);
    element?.setAttribute("aria-selected", String(one === node));
  }
  at("nodes").querySelector(".tabulator-tableholder")?.setAttribute("aria-activedescendant", `row-${node}`);
  const place = node < 0 ? "#" : address(node);
  if (!quiet && location.hash !== place) history.pushState(null, "", place);
  showDetail(node);
}

/** Bring the chosen row into sight; a filter that hides it goes. */
function reveal() {
  if (CHOSEN < 0) return;
  if (!MASK[CHOSEN]) { at("search").value = ""; narrow(CLEAR); }
  if (BUILT) TABLE.scrollToRow(CHOSEN, "center", false).catch(() => {});
}

function tableKeys() {
  at("nodes").addEventListener("keydown", event => {
    if (!event.target.classList.contains("tabulator-tableholder")) return;
    shownOrder ??= TABLE.getData("active").map(node => node.at);
    const here = shownOrder.indexOf(CHOSEN), last = shownOrder.length - 1;
    const steps = {ArrowDown: here + 1, ArrowUp: here - 1, PageDown: here + 20, PageUp: here - 20, Home: 0, End: last};
    if (event.key === "Enter" && CHOSEN >= 0) { event.preventDefault(); at("detail").querySelector("h2")?.focus(); }
    if (!(event.key in steps) || last < 0) return;
    event.preventDefault();
    choose(shownOrder[Math.max(0, Math.min(last, steps[event.key]))], {quiet: true});
    TABLE.scrollToRow(CHOSEN, "nearest", false).catch(() => {});
  });
}
