// What all tables have in common: Tabulator's virtual rows, all of one height.

const cell = (text, kind) => make("span", {class: kind, title: text}, text);

const number = (title, field, words) =>
  ({title, field, width: 78, hozAlign: "right", headerSortStartingDir: "desc", formatter: one => cell(words(one.getValue()), "num")});

/** A table of ours: text is never HTML, numbers sort as numbers, words by their letters and digits. */
function virtualTable(place, rows, columns, more) {
  const defaults = {headerSortTristate: true, resizable: "header", sorter: bySort};
  return new Tabulator(place, {
    data: rows, columns, columnDefaults: defaults, index: "at", layout: "fitColumns", height: "100%", rowHeight: 29,
    placeholder: "Nothing matches.", renderVerticalBuffer: 320, ...more,
  });
}

const collator = new Intl.Collator("en", {numeric: true});
const rank = value => ({inf: Infinity, "-inf": -Infinity})[value] ?? value;

function bySort(a, b) {
  const [first, second] = [rank(a), rank(b)];
  if (typeof first === "number" && typeof second === "number") return first === second ? 0 : first - second;
  return collator.compare(first, second);
}
