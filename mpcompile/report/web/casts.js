// The casts, as a table of their own: made when first looked at.

let CAST_TABLE = null;

function castTable() {
  CAST_TABLE ??= virtualTable(at("casts"), CASTS.map(one => ({...one, times: one.readers.length})), castColumns(), {rowHeight: 29});
}

function castColumns() {
  const value = {title: "value", field: "value", widthGrow: 2, minWidth: 140, formatter: one => valueCell(one.getValue())};
  const pair = {title: "from → to", field: "to", width: 150, formatter: one => make("span", {}, chip(one.getData().from), " → ", chip(one.getData().to))};
  const bytes = {title: "bytes", field: "bytes", width: 90, hozAlign: "right", headerSortStartingDir: "desc", formatter: one => cell(size(one.getValue()), "num")};
  if (phone.matches) return [value, {...pair, width: 130}, bytes];
  return [value, pair, {title: "origin", field: "origin", width: 110, formatter: one => cell(one.getValue(), "")}, bytes,
    {title: "readers", field: "times", widthGrow: 3, minWidth: 180, headerSortStartingDir: "desc", formatter: one => readersCell(one.getData().readers)}];
}

const valueCell = name => AT.has(name) ? nodeLink(AT.get(name)) : cell(name, "mono");

function readersCell(readers) {
  const shown = readers.slice(0, 6).map((name, i) => [i ? ", " : "", valueCell(name)]);
  return make("span", {}, shown.flat(), readers.length > 6 ? ` and ${readers.length - 6} more` : "");
}
