"use strict";
(() => {
  const cell = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

  function sortBy(table, header) {
    const headers = [...table.tHead.rows[0].cells];
    const column = headers.indexOf(header);
    const numbers = header.dataset.sort === "number";
    const before = header.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? "descending" : "ascending") : numbers ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      if (!numbers) return sign * a.localeCompare(b, undefined, { numeric: true });
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not a number comes last
      return sign * (Number(a) - Number(b));
    };
    const rows = [...table.tBodies[0].rows];
    table.tBodies[0].append(...rows.sort((a, b) => compare(cell(a, column), cell(b, column))));
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
  }

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("table"), button.closest("th")));
  }

  // Filtering: only rows whose name has the text in it are shown.
  for (const input of document.querySelectorAll("[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    const output = input.closest(".filter").querySelector("output");
    input.closest(".filter").hidden = false;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      output.textContent = `${shown} of ${rows.length}`;
    });
  }

  // A table that is wider than the screen says so: a shadow alone is easily missed.
  for (const wide of document.querySelectorAll(".wide")) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = "more to the right: scroll \u2192";
    wide.before(hint);
    const look = () => hint.classList.toggle("on", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 4);
    wide.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(wide);
    look();
  }

  // Downloads are made of the numbers in this page: no server has them.
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  // A cell that a spreadsheet would take for a formula gets a quote in front.
  const field = (x) => {
    if (typeof x !== "string") return x ?? "";
    const text = /^[=+\-@\t\r]/.test(x) ? "'" + x : x;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (names, rows) => [names, ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  const columns = (table, names) => {
    const present = names.filter((name) => table[name]);
    return csv(present, table[present[0]].map((_, i) => present.map((name) => table[name][i])));
  };
  const records = (table) => {
    const names = [...new Set(Object.values(table).flatMap((one) => Object.keys(one)))];
    return csv(["name", ...names], Object.entries(table).map(([name, one]) => [name, ...names.map((key) => one[key])]));
  };
  const makers = {
    "numbers.json": () => JSON.stringify(numbers, null, 1),
    "eigenvalues.csv": () => columns(numbers, ["eigenvalues", "residuals", "rounding", "data_stderr", "converged"]),
    "layers.csv": () => records(numbers.layers),
    "activations.csv": () => records(numbers.activations),
    "density.csv": () => columns(numbers.density, ["grid", "values", "lower", "upper"]),
    "reports.csv": () => records(numbers.reports),
  };
  for (const button of document.querySelectorAll("[data-download]")) {
    button.parentElement.hidden = false;
    button.addEventListener("click", () => {
      const name = button.dataset.download;
      const type = name.endsWith(".csv") ? "text/csv" : "application/json";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([makers[name]()], { type }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  }
})();
