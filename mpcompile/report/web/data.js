// The report, out of its columns. One object per node: `at` is its place, which is how everything else names it.

const DATA = JSON.parse(at("data").textContent);
const NODES = unpack(DATA.nodes);
const CASTS = unpack(DATA.casts);
const AT = new Map(NODES.map(node => [node.id, node.at]));
// A node's address in the page; names that no address can hold (half of a character) go by their place.
const address = node => NODES[node].id.isWellFormed?.() === false ? `#at=${node}` : `#node=${encodeURIComponent(NODES[node].id)}`;

function addressed(hash) {
  const [, kind, rest] = /^#(node|at)=(.*)$/.exec(hash) ?? [];
  if (kind === "at") return NODES[rest] ? Number(rest) : -1;
  try {
    return kind ? AT.get(decodeURIComponent(rest)) ?? -1 : -1;
  } catch { // not an address of this page's
    return -1;
  }
}

const VALUES = unpack(DATA.values, ["name", "maker", "role", "type", "origin", "bytes"]);
const LINKS = link(DATA.values);

/** reads[node] and readers[value]: lists of {node, value, cast}, cast -1 for none. */
function link(values) {
  const reads = NODES.map(() => []), readers = VALUES.map(() => []), given = NODES.map(() => []);
  for (const value of VALUES) {
    if (value.maker < 0) continue;
    value.name ||= NODES[value.maker].id;
    given[value.maker].push(value.at);
  }
  for (let i = 0; i < values.reads.length; i += 3) {
    const [node, value, cast] = values.reads.slice(i, i + 3);
    const one = {node, value, cast};
    reads[node].push(one);
    readers[value].push(one);
  }
  for (const [value, cast] of values.returned) readers[value].push({node: -1, value, cast});
  return {reads, readers, given};
}

/** All that is searched in a node, in lower case. */
const haystack = node =>
  `${node.id}\n${node.op}\n${node.kind}\n${node.precision}\n${node.verdict}\n${node.decided_by}\n${node.reason}\n${node.module}\n${node.source}\n${node.phase}${DATA.fp8[node.at] ? "\nfp8" : ""}`.toLowerCase();
