// What all tables have in common: Tabulator's virtual rows, all of one height.

const cell = (text, kind) => make("span", {class: kind, title: text}, text);

const number = (title, field, words) =>
  ({title, field, width: 78, hozAlign: "right", headerSortStartingDir: "desc", formatter: one => cell(words(one.getValue()), "num")});

/** A table of ours: text is never HTML, numbers sort as numbers, words by their letters and digits. */
function virtualTable(place, rows, columns, more) {
  const defaults = {headerSortTristate: true, resizable: "header", sorter: bySort};
  return new Tabulator(place, {
    data: rows, columns, columnDefaults: defaults, index: "at", layout: "fitColumns", height: phone.matches ? "82vh" : "100%", rowHeight: 29,
    placeholder: "Nothing matches.", renderVerticalBuffer: 320, ...more,
  });
}

const collator = new Intl.Collator("en", {numeric: true});
const bySort = (a, b) => typeof a === "number" ? a - b : collator.compare(a, b);
