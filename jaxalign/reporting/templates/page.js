"use strict";
const all = (what, where = document) => [...where.querySelectorAll(what)];

// A label beside the pointer. It moves into an open dialog, which covers the rest of the page.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
function say(event, text) {
  (document.querySelector("dialog[open]") || document.body).append(tip);
  tip.textContent = text;
  tip.hidden = !text;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4);
  const below = event.clientY + 16;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 10) + "px";
}
const hush = () => { tip.hidden = true; };

// Charts: the values at the step nearest to the pointer, or the nearest of scattered points.
const shown = (value) => value === null ? "not a number" : String(Number(value.toPrecision(5)));
for (const chart of all("svg.chart")) {
  const { x: unit, y: height, names, series } = JSON.parse(chart.dataset.values);
  const points = series.flatMap((one) => one.at.map((at, index) => at && { one, at, index })).filter(Boolean);
  const cursor = chart.appendChild(document.createElementNS(chart.namespaceURI, "path"));
  cursor.setAttribute("class", "cursor");
  const clear = () => { hush(); cursor.removeAttribute("d"); };
  const move = (event) => {
    const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const away = ({ one, at }) => Math.hypot(at[0] - pointer.x, one.points ? at[1] - pointer.y : 0);
    if (!points.length) return;
    const nearest = points.reduce((a, b) => away(b) < away(a) ? b : a);
    if (nearest.one.points && away(nearest) > 20) return clear();
    const x = nearest.one.x[nearest.index];
    const here = points.filter((point) => !point.one.points && point.at[0] === nearest.at[0]);
    const lines = here.map(({ one, index }) => `${one.label}: ${shown(one.y[index])}`);
    if (nearest.one.points) say(event, `${nearest.one.label}\n${unit} ${shown(x)}\n${height} ${shown(nearest.one.y[nearest.index])}`);
    else say(event, [names.length ? names[x] : `${unit} ${shown(x)}`, ...lines].join("\n"));
    cursor.setAttribute("d", nearest.one.points
      ? `M${nearest.at[0] - 7} ${nearest.at[1]}h14m-7-7v14`
      : `M${nearest.at[0]} 10V210`);
  };
  chart.addEventListener("pointermove", move);
  chart.addEventListener("pointerdown", move);
  chart.addEventListener("pointerleave", clear);
}
for (const one of all("[data-tip]")) {
  one.addEventListener("pointermove", (event) => say(event, one.dataset.tip));
  one.addEventListener("pointerleave", hush);
}
for (const heat of all("table.heat")) {
  const tell = (event) => {
    const cell = event.target.closest("td[data-value]");
    if (!cell) return hush();
    const row = cell.parentElement.cells[0].textContent;
    const column = heat.rows[0].cells[cell.cellIndex].textContent;
    say(event, `${row} × ${column}: ${cell.dataset.value}`);
  };
  heat.addEventListener("pointermove", tell);
  heat.addEventListener("pointerdown", tell);
  heat.addEventListener("pointerleave", hush);
}

// Tables: a click on a header sorts, a second one reverses, a third one restores.
function rank(text) {
  if (/^-?∞/.test(text)) return text[0] === "-" ? -Infinity : Infinity;
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? null : number;
}
for (const table of all("table.sortable")) {
  const body = table.tBodies[0], before = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const order = { none: "ascending", ascending: "descending", descending: "none" };
    const sort = () => {
      const next = order[head.getAttribute("aria-sort") || "none"];
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      if (next === "none") return body.append(...before);
      head.setAttribute("aria-sort", next);
      const text = (row) => row.cells[column].textContent.trim();
      const words = head.classList.contains("words");
      const side = next === "ascending" ? 1 : -1;
      const compare = (a, b) => {
        const [s, t] = [text(a), text(b)], [x, y] = [rank(s), rank(t)];
        if (words) return side * s.localeCompare(t, undefined, { numeric: true });
        if (x === null || y === null) return (x === null) - (y === null);
        return side * (x === y ? 0 : x < y ? -1 : 1);
      };
      body.append(...[...before].sort(compare));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}

// Filters: every field of the form has to accept a row.
for (const form of all("form[data-filters]")) {
  const rows = [...document.getElementById(form.dataset.filters).tBodies[0].rows];
  const texts = rows.map((row) => (document.querySelector(row.querySelector("a").hash) || row).textContent.toLowerCase());
  const accepts = (field, row, index) => {
    const has = row.dataset[field.name];
    if (field.type === "checkbox") return !field.checked || has === field.value;
    if (!field.value) return true;
    if (field.name === "text") return texts[index].includes(field.value.toLowerCase());
    if (!field.dataset.bound) return has === field.value;
    return field.dataset.bound === "low" ? Number(has) >= Number(field.value) : Number(has) <= Number(field.value);
  };
  const select = () => {
    const fields = [...form.elements].filter((field) => field.name);
    rows.forEach((row, index) => { row.hidden = !fields.every((field) => accepts(field, row, index)); });
    form.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  form.addEventListener("input", select);
  form.addEventListener("submit", (event) => event.preventDefault());
  select();
}
for (const field of all("[data-selects]")) {
  const figures = all("figure", document.getElementById(field.dataset.selects));
  field.addEventListener("input", () => figures.forEach((one) => {
    one.hidden = !one.querySelector("b").textContent.toLowerCase().includes(field.value.toLowerCase());
  }));
}

// Pairs: the address names the open one; arrows lead to those that the filter shows.
function open() {
  all("dialog[open]").forEach((one) => one.close());
  const dialog = location.hash.startsWith("#pair-") && document.getElementById(location.hash.slice(1));
  if (dialog) dialog.showModal();
}
function step(dialog, by) {
  const links = all("table.choose tbody tr:not([hidden]) a").map((link) => link.hash);
  const next = links[links.indexOf("#" + dialog.id) + by];
  if (next) location.replace(next);
}
for (const dialog of all("dialog")) {
  dialog.addEventListener("close", () => location.hash === "#" + dialog.id && history.replaceState(null, "", " "));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) step(dialog, by);
  });
  all("[data-step]", dialog).forEach((one) => one.addEventListener("click", () => step(dialog, Number(one.dataset.step))));
}
for (const row of all("table.choose tbody tr")) {
  row.addEventListener("click", () => { location.hash = row.querySelector("a").hash; });
}
addEventListener("hashchange", open);
open();

for (const button of all("[data-open]")) {
  button.addEventListener("click", () => all(".tree details").forEach((one) => {
    one.open = button.dataset.open === "all" || (button.dataset.open === "best" && one.classList.contains("best"));
  }));
}
document.documentElement.dataset.ready = "";
