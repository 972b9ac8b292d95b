// All that is known of the chosen node: its neighbourhood drawn, and the same in words with links.

let HOPS = 1;

function showDetail(node) {
  const panel = at("detail");
  const width = at("nodes").clientWidth;
  panel.hidden = node < 0;
  if (node < 0) panel.replaceChildren();
  else panel.replaceChildren(make("div", {class: "inside"}, drawn(node), said(NODES[node])));
  if (BUILT && at("nodes").clientWidth !== width) fitAnew(node);
  if (node < 0) return;
  panel.scrollTop = 0;
  centreOn(panel.querySelector(".canvas"));
}

/** Beside the panel the table is narrower: `why` gives way, and the chosen row stays in sight. */
function fitAnew(node) {
  TABLE.redraw();
  if (node >= 0) TABLE.scrollToRow(node, "nearest", false).catch(() => {});
}

function drawn(node) {
  const canvas = make("div", {class: "canvas"});
  const note = make("span", {class: "note"});
  const paint = () => {
    const {svg, left, focus} = neighbourhood(node, HOPS, phone.matches || window.innerWidth >= 1700);
    canvas.replaceChildren(svg);
    canvas.focusOn = focus;
    note.textContent = left ? `${count(left)} more edges do not fit` : "";
  };
  const button = hops => make("button", {type: "button", "aria-pressed": String(HOPS === hops), "data-hops": hops, onclick: event => {
    HOPS = hops;
    for (const one of event.target.parentElement.querySelectorAll("[data-hops]")) one.setAttribute("aria-pressed", String(one === event.target));
    paint();
    centreOn(canvas);
  }}, hops === 1 ? "1 hop" : `${hops} hops`);
  paint();
  return make("div", {class: "drawn"}, make("div", {class: "bar"}, make("b", {}, "Neighbours"), make("span", {class: "chips"}, button(1), " ", button(2)), note), canvas);
}

function centreOn(canvas) {
  const {x, y} = canvas.focusOn;
  canvas.scrollTo(x - canvas.clientWidth / 2, y - canvas.clientHeight / 2);
}

const nodeLink = node => make("a", {href: address(node), class: "mono"}, NODES[node].id);

function said(node) {
  const facts = [
    ["operation", make("code", {}, node.op)],
    ["decided", `${node.verdict}, by ${node.decided_by}`],
    ["module", node.module ? make("code", {}, node.module) : "(the model itself)"],
    ["source", node.source ? sourceLine(node) : "not known"],
    ["results", [size(node.bytes), node.flops ? `${flops(node.flops)} FLOP` : "", node.seconds ? `about ${seconds(node.seconds)}` : ""].filter(Boolean).join(", ")],
  ];
  for (const [product, why] of Object.entries(DATA.fp8[node.at] ?? {})) facts.push([chip("fp8"), `its product ${product} reads FP8: ${why}`]);
  if (node.phase !== "forward") facts.push(["phase", node.phase]);
  return make("div", {class: "say"},
    make("div", {class: "top"}, make("h2", {tabindex: -1}, node.id, " ", chip(node.precision)),
      make("button", {type: "button", "aria-label": "Close the node", onclick: close}, "✕")),
    make("p", {class: "reason"}, node.reason),
    make("dl", {}, facts.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    list("Reads", LINKS.reads[node.at].map(readWords)),
    list("Is read by", LINKS.given[node.at].flatMap(value => LINKS.readers[value].map(readerWords))),
    change(node));
}

function sourceLine(node) {
  const code = DATA.code[DATA.nodes.source.at[node.at]];
  return [make("code", {}, node.source), code ? make("pre", {class: "code"}, code) : null];
}

function close() {
  choose(-1);
  at("nodes").querySelector(".tabulator-tableholder")?.focus();
}

const list = (title, items) => [make("h3", {}, title), items.length ? make("ul", {}, items.map(item => make("li", {}, item))) : make("p", {class: "note"}, "nothing")];

const through = cast => cast < 0 ? [] : [" through a cast ", chip(CASTS[cast].from), " → ", chip(CASTS[cast].to), ` (${CASTS[cast].origin}, ${size(CASTS[cast].bytes)})`];

function readWords({value, cast}) {
  const one = VALUES[value];
  const name = one.maker < 0 ? [make("span", {class: "mono"}, one.name), ` (${one.role})`] : [nodeLink(one.maker)];
  return [...name, " ", make("span", {class: "note mono"}, one.origin ? `${one.type}, ${one.origin}` : one.type), ...through(cast)];
}

const readerWords = ({node, cast}) => [node < 0 ? "returned to the caller" : nodeLink(node), ...through(cast)];

function change(node) {
  if (node.precision === "keep" || !node.precision) return [];
  const other = node.precision === "fp32" ? "low" : "keep_fp32";
  return [make("h3", {}, "To change it"), make("pre", {class: "code"}, `mpcompile(model, ${other}=[${JSON.stringify(node.id)}])`)];
}
