// The neighbourhood of a node, laid out by dagre: what it reads and who reads it, casts on the way, one or two hops.

const MOST = 36; // boxes in one picture
const CH = 7.3;  // width of a letter

/** Boxes and edges around `centre`: {boxes: Map key -> box, edges: [{from, to}], left: how many did not fit}. */
function surroundings(centre, hops) {
  const found = {boxes: new Map(), edges: [], left: 0};
  addNode(found, centre);
  let ring = [centre];
  for (let hop = 0; hop < hops; hop++) {
    const next = [];
    for (const node of ring) {
      for (const read of LINKS.reads[node]) addRead(found, read, next);
      for (const value of LINKS.given[node]) for (const read of LINKS.readers[value]) addRead(found, read, next);
    }
    ring = next;
  }
  return found;
}

const full = found => found.boxes.size >= MOST;

function addNode(found, node) {
  const key = `n${node}`;
  if (!found.boxes.has(key)) {
    const one = NODES[node];
    found.boxes.set(key, {kind: "node", node, lines: [clip(one.id, 26), clip(`${shortOp(one.op)} · ${one.precision}`, 30)]});
    return true;
  }
  return false;
}

/** One operand: from its maker (or its value, when the graph is given it) through its cast to its reader. */
function addRead(found, {node, value, cast}, next) {
  const maker = VALUES[value].maker, from = maker < 0 ? `v${value}` : `n${maker}`, to = node < 0 ? `o${value}` : `n${node}`;
  const missing = [from, to].filter(key => !found.boxes.has(key)).length;
  if (missing && full(found)) { found.left++; return; }
  if (maker >= 0) { if (addNode(found, maker)) next.push(maker); }
  else found.boxes.set(from, {kind: "value", lines: [clip(VALUES[value].name, 26), `${VALUES[value].role} ${VALUES[value].type}`]});
  if (node >= 0) { if (addNode(found, node)) next.push(node); }
  else found.boxes.set(to, {kind: "value", lines: ["returned", clip(VALUES[value].name, 26)]});
  if (cast < 0) { join(found, from, to); return; }
  const key = `c${cast}`, one = CASTS[cast];
  found.boxes.set(key, {kind: "cast", lines: [`${one.from} → ${one.to}`, one.origin === "shadow" ? "shadow" : size(one.bytes)], said: castWords(one)});
  join(found, from, key);
  join(found, key, to);
}

const castWords = one => `cast of ${one.value} from ${one.from} to ${one.to}, ${one.origin}, ${size(one.bytes)}`;

function join(found, from, to) {
  if (!found.edges.some(edge => edge.from === from && edge.to === to)) found.edges.push({from, to});
}

const clip = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;

function layOut(found, upright) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({rankdir: upright ? "TB" : "LR", nodesep: 14, ranksep: 34, marginx: 12, marginy: 12});
  graph.setDefaultEdgeLabel(() => ({}));
  for (const [key, box] of found.boxes) {
    const width = Math.max(...box.lines.map(line => line.length)) * (box.kind === "node" ? CH : CH * 0.92) + 18;
    graph.setNode(key, {width, height: box.kind === "cast" ? 36 : 44});
  }
  for (const {from, to} of found.edges) graph.setEdge(from, to);
  dagre.layout(graph);
  return graph;
}

/** The picture as SVG. Every node in it is a link; the lists beside it say the same in words. */
function neighbourhood(centre, hops, upright) {
  const found = surroundings(centre, hops);
  const graph = layOut(found, upright);
  const {width, height} = graph.graph();
  const svg = draw("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `${NODES[centre].id} and what is within ${hops} hop${hops > 1 ? "s" : ""}: ${found.boxes.size} boxes`});
  svg.append(draw("defs", {}, draw("marker", {id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto"},
    draw("path", {class: "arrow", d: "M0 0 L8 4 L0 8 z"}))));
  for (const edge of graph.edges()) svg.append(draw("path", {class: "edge", "marker-end": "url(#arrow)", d: smooth(graph.edge(edge).points)}));
  for (const [key, box] of found.boxes) svg.append(drawBox(graph.node(key), box, centre));
  return {svg, left: found.left, focus: graph.node(`n${centre}`)};
}

function smooth(points) {
  let path = `M${points[0].x} ${points[0].y}`;
  for (let i = 1; i < points.length - 1; i++) {
    const here = points[i], next = points[i + 1];
    path += ` Q${here.x} ${here.y} ${(here.x + next.x) / 2} ${(here.y + next.y) / 2}`;
  }
  return `${path} L${points.at(-1).x} ${points.at(-1).y}`;
}

function drawBox({x, y, width, height}, box, centre) {
  const words = box.lines.map((line, i) => draw("text", {x, y: y + (i ? 13 : -2), "text-anchor": "middle", class: i ? "small" : ""}, line));
  const area = {x: x - width / 2, y: y - height / 2, width, height, rx: box.kind === "cast" ? height / 2 : 6};
  if (box.kind === "value") return draw("g", {class: "value"}, words);
  if (box.kind === "cast") return draw("g", {class: "castbox", role: "img", "aria-label": box.said}, draw("title", {}, box.said), draw("rect", area), words);
  const node = NODES[box.node];
  const said = `${node.id}, ${node.op}, ${node.precision}: ${node.reason}`;
  const go = () => { choose(box.node); reveal(); };
  return draw("g", {class: `box ${node.precision} ${box.node === centre ? "here" : ""}`, tabindex: 0, role: "link", "aria-label": said,
    onclick: go, onkeydown: event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); go(); } }},
  draw("title", {}, said),
  draw("rect", {...area, class: `fill ${node.precision} frame`}),
  draw("rect", {class: "plate", x: area.x + 7, y: area.y + 4, width: width - 14, height: height - 8, rx: 4}),
  words);
}
