// Start: tabs, the address, and then the views.

const TABS = {nodes: () => { if (BUILT) TABLE.redraw(); }, casts: () => castTable(), passes: () => passView()};

function openTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const here = tab.id === `${name}-tab`;
    tab.setAttribute("aria-selected", String(here));
    tab.tabIndex = here ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !here;
  }
  TABS[name]();
}

function tabEvents() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => openTab(tab.id.replace("-tab", "")));
    tab.addEventListener("keydown", event => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!by) return;
      const next = tabs[(i + by + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  });
}

function foldEvents() {
  at("fold").addEventListener("click", () => {
    const open = at("fold").getAttribute("aria-expanded") !== "true";
    at("fold").setAttribute("aria-expanded", String(open));
    at("headline").hidden = !open;
    if (BUILT) TABLE.redraw();
  });
}

/** `#node=linear_3` names the chosen node, so that links, the back button and bookmarks work. */
function followAddress() {
  const node = addressed(location.hash);
  if (node === CHOSEN) return;
  if (node >= 0) openTab("nodes");
  choose(node, {quiet: true});
  reveal();
}

themeEvents();
foldEvents();
tabEvents();
filterChips();
filterEvents();
moduleTree();
nodeTable();
tableKeys();
narrow({});
listeners.push(() => { if (BUILT) TABLE.refreshFilter(); });
phone.addEventListener("change", nodeTable);
window.addEventListener("hashchange", followAddress);
window.addEventListener("popstate", followAddress);
window.addEventListener("keydown", event => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing) { event.preventDefault(); openTab("nodes"); at("search").focus(); }
  if (event.key === "Escape" && CHOSEN >= 0 && !typing) close();
});
