// Sorts a table by the column whose head is pressed; a second press turns the order around.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const numeric = head.classList.contains("number");
      const order = (a, b) =>
        numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [key(row), row]);
      const known = rows.filter(([value]) => value !== "");
      const unknown = rows.filter(([value]) => value === "");  // last in either order
      known.sort(([a], [b]) => (down ? order(b, a) : order(a, b)));
      body.append(...known.concat(unknown).map(([, row]) => row));
    });
  });
}
