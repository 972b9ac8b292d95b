// The module tree, by the WAI-ARIA pattern of a tree view: arrows, Home, End, Enter; branches are made when first opened.

const DEEP = 2;

function moduleTree() {
  const root = at("tree");
  const [, , sums] = DATA.tree;
  const total = amount(sums, 3) ? 3 : 1;
  root.append(branch(DATA.tree, "", total, 1));
  root.querySelector("[role=treeitem]").tabIndex = 0;
  root.addEventListener("keydown", treeKey);
  at("modules-fold").addEventListener("click", () => {
    const open = at("modules-fold").getAttribute("aria-expanded") !== "true";
    at("modules-fold").setAttribute("aria-expanded", String(open));
    root.hidden = !open;
  });
  if (phone.matches) at("modules-fold").click();
  listeners.push(() => {
    for (const item of root.querySelectorAll("[aria-selected=true]")) item.setAttribute("aria-selected", "false");
    const here = [...root.querySelectorAll("[role=treeitem]")].find(item => item.path === FILTER.module && FILTER.modules);
    here?.setAttribute("aria-selected", "true");
  });
}

const amount = (sums, what) => Object.values(sums).reduce((sum, one) => sum + one[what], 0);

/** One item: [name, module numbers, {precision: [nodes, bytes, FLOPs, seconds]}, below], and the bars of its bytes and time. */
function branch(tree, above, most, level) {
  const [name, modules, sums, below] = tree;
  const path = level === 1 ? "" : above ? `${above}.${name}` : name;
  const times = /^\{.*\}$/.test(name) ? copies(name) : 0;
  const nodes = ORDER.filter(one => sums[one]).map(one => `${count(sums[one][0])} ${one}`).join(", ");
  const said = `${name}${times ? `, ${times} alike` : ""}: ${nodes}; ${size(amount(sums, 1))} of results${amount(sums, 3) ? `, ${seconds(amount(sums, 3))}` : ""}`;
  const item = make("li", {role: "treeitem", tabindex: -1, "aria-level": level, "aria-selected": "false", "aria-label": said, title: said});
  item.path = path;
  item.append(make("div", {class: "row", onclick: () => pick(item, tree, path)},
    make("span", {class: "twist", "aria-hidden": "true", onclick: event => { event.stopPropagation(); toggle(item); }}, below.length ? "▸" : ""),
    make("span", {class: "name"}, name, times ? make("span", {class: "times"}, `×${times}`) : null),
    make("span", {"aria-hidden": "true"}, bar(sums, 1, amount(DATA.tree[2], 1)), bar(sums, 3, amount(DATA.tree[2], 3)))));
  if (below.length) {
    item.setAttribute("aria-expanded", "false");
    item.open = () => below.map(one => branch(one, path, most, level + 1));
    if (level <= DEEP) toggle(item);
  }
  item.choose = () => pick(item, tree, path);
  return item;
}

function copies(name) {
  return name.slice(1, -1).split(",").reduce((sum, part) => {
    const [from, to] = part.split("-").map(Number);
    return sum + (to === undefined ? 1 : to - from + 1);
  }, 0);
}

/** Shares by precision, as wide as the module's share of the whole: at least a sliver. */
function bar(sums, what, whole) {
  const svg = draw("svg", {width: "100%", height: 5});
  let x = 0;
  for (const one of ORDER) {
    const width = whole && sums[one] ? 100 * sums[one][what] / whole : 0;
    if (!width) continue;
    svg.append(draw("rect", {class: `fill ${one}`, x: `${x}%`, width: `${Math.max(width, 0.8)}%`, height: 5}));
    x += width;
  }
  return svg;
}

function toggle(item, open = item.getAttribute("aria-expanded") !== "true") {
  if (!item.hasAttribute("aria-expanded")) return;
  if (item.open) {
    item.append(make("ul", {role: "group"}, item.open()));
    item.open = null;
  }
  item.setAttribute("aria-expanded", String(open));
  item.lastElementChild.hidden = !open;
  item.querySelector(".twist").textContent = open ? "▾" : "▸";
}

function pick(item, tree, path) {
  focusItem(item);
  if (!path || FILTER.module === path) return narrow({modules: null, module: ""});
  const modules = new Set();
  const collect = one => { one[1].forEach(number => modules.add(number)); one[3].forEach(collect); };
  collect(tree);
  narrow({modules, module: path});
}

function focusItem(item) {
  for (const other of at("tree").querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  item.tabIndex = 0;
  item.focus();
}

function treeKey(event) {
  const item = document.activeElement.closest("[role=treeitem]");
  const shown = [...at("tree").querySelectorAll("[role=treeitem]")].filter(one => one.offsetParent !== null);
  const move = by => shown[Math.min(shown.length - 1, Math.max(0, shown.indexOf(item) + by))];
  const open = item.getAttribute("aria-expanded") === "true";
  const keys = {
    ArrowDown: () => focusItem(move(1)),
    ArrowUp: () => focusItem(move(-1)),
    Home: () => focusItem(shown[0]),
    End: () => focusItem(shown.at(-1)),
    ArrowRight: () => open ? focusItem(move(1)) : toggle(item, true),
    ArrowLeft: () => open ? toggle(item, false) : focusItem(item.parentElement.closest("[role=treeitem]") ?? item),
    Enter: () => item.choose(),
    " ": () => item.choose(),
  };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
}
