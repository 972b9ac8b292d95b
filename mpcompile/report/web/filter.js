// What is shown of the nodes: words, a precision, who decided, a phase, a module, a reason. One mask, made in one go.

const ORDER = ["bf16", "fp16", "fp32", "keep"];
const FILTER = {words: [], precision: "", by: "", phase: "", modules: null, module: "", why: null};
const MASK = new Uint8Array(NODES.length).fill(1);
const listeners = [];
let hay = null;

function narrow(change) {
  Object.assign(FILTER, change);
  hay ??= NODES.map(haystack);
  const {words, precision, by, phase, modules, why} = FILTER;
  const moduleOf = DATA.nodes.module.at, whyOf = DATA.nodes.reason.at;
  let shown = 0;
  for (let i = 0; i < NODES.length; i++) {
    const node = NODES[i];
    MASK[i] = (!precision || node.precision === precision) && (!by || node.decided_by === by) && (!phase || node.phase === phase)
      && (!modules || modules.has(moduleOf[i])) && (!why || why.has(whyOf[i])) && words.every(word => hay[i].includes(word));
    shown += MASK[i];
  }
  const where = FILTER.module ? ` in ${FILTER.module}` : "";
  at("shown").textContent = `${count(shown)} of ${count(NODES.length)} nodes${where}`;
  for (const listener of listeners) listener(shown);
}

const CLEAR = {words: [], precision: "", by: "", phase: "", modules: null, module: "", why: null};

/** Buttons for each precision, decider and phase that the report has, and one that clears. */
function filterChips() {
  const box = at("chips"), buttons = [];
  const add = (field, value, label) => {
    const button = make("button", {type: "button", "aria-pressed": "false",
      onclick: () => narrow({[field]: FILTER[field] === value ? "" : value})}, label);
    buttons.push([button, field, value]);
    box.append(button);
  };
  const several = field => DATA.nodes[field].words;
  for (const one of ORDER.filter(one => several("precision").includes(one))) add("precision", one, chip(one));
  for (const one of several("decided_by")) if (one !== "rule") add("by", one, `by ${one}`);
  if (several("phase").length > 1) for (const one of several("phase")) add("phase", one, one);
  const clear = make("button", {type: "button", hidden: true, onclick: () => { at("search").value = ""; narrow(CLEAR); }}, "✕ clear");
  box.append(clear);
  listeners.push(() => {
    for (const [button, field, value] of buttons) button.setAttribute("aria-pressed", String(FILTER[field] === value));
    clear.hidden = !(FILTER.words.length || FILTER.precision || FILTER.by || FILTER.phase || FILTER.modules || FILTER.why);
  });
}

function filterEvents() {
  at("search").addEventListener("input", perFrame(() => narrow({words: at("search").value.toLowerCase().split(/\s+/).filter(Boolean)})));
  const reasons = new Map(DATA.nodes.reason.words.map((word, number) => [word, number]));
  for (const button of document.querySelectorAll("button.why")) {
    button.addEventListener("click", () => {
      const why = new Set(JSON.parse(button.dataset.why).map(text => reasons.get(text)));
      openTab("nodes");
      narrow({...CLEAR, why, precision: "fp32"});
    });
  }
  for (const button of document.querySelectorAll("button.flag")) {
    button.addEventListener("click", () => { openTab("nodes"); narrow({...CLEAR, by: button.dataset.by}); });
  }
}
