"use strict";
(() => {
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));
  const number = (value) => (value === "" || value === null || value === undefined ? NaN : Number(value));

  // What has no number stands last in both directions.
  const compare = (first, second, sign) => {
    if (Number.isNaN(first) || Number.isNaN(second)) {
      return Number(Number.isNaN(first)) - Number(Number.isNaN(second));
    }
    return sign * (first - second);
  };

  // Tables: a heading sorts, sorts the other way round, and gives the first order back.
  const sortTable = (table, heading) => {
    const first = heading.dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const now = heading.getAttribute("aria-sort");
    const next = now === first ? other : now === other ? "none" : first;
    all(table, "th[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
    if (next !== "none") heading.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const key = (row) => row.cells[heading.cellIndex].dataset.value;
    const byCell = heading.dataset.kind === "text"
      ? (a, b) => sign * key(a).localeCompare(key(b), undefined, { numeric: true })
      : (a, b) => compare(number(key(a)), number(key(b)), sign);
    const byPlace = (a, b) => a.dataset.place - b.dataset.place;
    const rows = all(table.tBodies[0], "tr").sort(byPlace);
    table.tBodies[0].append(...(next === "none" ? rows : rows.sort(byCell)));
  };

  all(document, "table.sortable").forEach((table) => {
    all(table, "th[data-kind]").forEach((heading) => {
      const button = document.createElement("button");
      button.type = "button";
      const text = heading.querySelector(".heading");
      text.replaceWith(button);
      button.append(text);
      button.addEventListener("click", () => sortTable(table, heading));
    });
  });

  const form = document.getElementById("controls");
  if (!form) return;
  form.hidden = false;
  const list = document.getElementById("entries");
  const entries = all(list, "article").map((node, place) => ({
    node,
    place,
    text: node.querySelector(".caption").textContent.toLowerCase(),
    values: JSON.parse(node.dataset.values),
  }));
  const chosen = (name) => (form.elements[name] ? form.elements[name].value : "");

  const entryKey = (entry, shown) => {
    const values = (entry.values[chosen("score")] || []).map(number);
    if (chosen("order") === "difference") return values[chosen("first")] - values[chosen("second")];
    const known = values.filter((value, place) => shown.has(String(place)) && !Number.isNaN(value));
    return known.length > 1 ? Math.max(...known) - Math.min(...known) : NaN;
  };

  const sortEntries = (shown) => {
    const byPlace = (a, b) => a.place - b.place;
    const keys = new Map(entries.map((entry) => [entry, entryKey(entry, shown)]));
    const byKey = (a, b) => compare(keys.get(a), keys.get(b), -1) || byPlace(a, b);
    const sorted = [...entries].sort(chosen("order") === "place" ? byPlace : byKey);
    list.append(...sorted.map((entry) => entry.node));
  };

  const sortVariants = () => {
    const metric = form.elements.variants.selectedOptions[0];
    const values = JSON.parse(metric.dataset.values || "{}");
    const sign = metric.dataset.first === "ascending" ? 1 : -1;
    const key = (figure) => number(values[figure.dataset.variant]);
    const byPlace = (a, b) => a.dataset.variant - b.dataset.variant;
    all(list, ".variants").forEach((row) => {
      const figures = all(row, "figure");
      row.append(...figures.sort((a, b) => compare(key(a), key(b), sign) || byPlace(a, b)));
    });
  };

  const update = () => {
    const boxes = all(form, "input[name=variant]");
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const words = chosen("text").toLowerCase().split(/\s+/);
    all(list, "figure").forEach((one) => { one.hidden = !shown.has(one.dataset.variant); });
    entries.forEach((one) => { one.node.hidden = !words.every((word) => one.text.includes(word)); });
    all(form, "[data-only]").forEach((one) => { one.hidden = one.dataset.only !== chosen("order"); });
    all(form, "[data-not]").forEach((one) => { one.hidden = one.dataset.not === chosen("order"); });
    sortEntries(shown);
    sortVariants();
    const count = entries.filter((one) => !one.node.hidden).length;
    form.elements.count.value = `${count} of ${entries.length} captions, ${shown.size} of ${boxes.length} variants`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  update();

  // A segment is marked in the caption and under all pictures.
  const mark = (event) => {
    const segment = event.target.closest("[data-segment]");
    all(list, ".on").forEach((one) => one.classList.remove("on"));
    if (!segment) return;
    const same = `[data-segment="${segment.dataset.segment}"]`;
    all(segment.closest("article"), same).forEach((one) => one.classList.add("on"));
  };
  ["pointerover", "click"].forEach((name) => list.addEventListener(name, mark));
})();
