// Tables: what their numbers are, and which rows they show in which order.

const modes = document.getElementById("modes");
modes.hidden = false;
modes.addEventListener("change", (event) => {
  document.body.dataset.mode = event.target.value;
});

/** The number of a cell in the present view; NaN where there is none. */
function number(row, column) {
  const key = document.body.dataset.mode;
  return parseFloat(row.cells[column]?.dataset[key] ?? "");
}

// What a cell's data are called in a CSV file.
const CSV = {
  value: "mean",
  error: "standard_error",
  low: "low_95",
  high: "high_95",
  n: "n",
  epochs: "epochs",
  paper: "paper",
  difference: "difference",
  gain: "gain",
  gainLow: "gain_low_95",
  gainHigh: "gain_high_95",
  gainOver: "gain_over",
};

class NumberTable {
  constructor(panel) {
    this.table = panel.querySelector("table");
    this.rows = [...this.table.tBodies[0].rows]; // as they were written
    this.heads = [...this.table.tHead.rows[0].cells];
    this.column = null;
    this.descending = true;
    panel.querySelector(".tools").hidden = false;
    panel.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button?.dataset.column) this.sortBy(Number(button.dataset.column));
      else if (button && "copy" in button.dataset) copy(this.csv(), button);
      else if (button?.dataset.download) download(button.dataset.download, "text/csv", this.csv());
    });
    panel.addEventListener("change", ({ target }) => {
      if (target.dataset.row) this.rows[Number(target.dataset.row)].hidden = !target.checked;
      this.grouped = panel.querySelector("[data-group]")?.checked ?? false;
      this.show();
    });
    modes.addEventListener("change", () => this.show());
  }

  /** The largest first, then the smallest first, then as they were. */
  sortBy(column) {
    if (this.column !== column) [this.column, this.descending] = [column, true];
    else if (this.descending) this.descending = false;
    else this.column = null;
    this.show();
    const head = this.heads[column].querySelector("button").textContent;
    say(
      this.column === null
        ? "Sorted as at first"
        : `Sorted by ${head}, ${this.descending ? "largest" : "smallest"} first`,
    );
  }

  show() {
    this.heads.forEach((head, column) => {
      if (column === this.column) head.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const rows = [...this.rows];
    if (this.column !== null) {
      const sign = this.descending ? -1 : 1;
      const at = (row) => {
        const value = number(row, this.column);
        return Number.isNaN(value) ? Infinity : sign * value; // rows without a number come last
      };
      rows.sort((a, b) => (at(a) === at(b) ? 0 : at(a) - at(b)));
    }
    const body = this.table.tBodies[0];
    if (!this.grouped) {
      body.replaceChildren(...rows);
      return;
    }
    const groups = [...new Set(this.rows.map((row) => row.dataset.base))];
    body.replaceChildren(
      ...groups.flatMap((base) => {
        const members = rows.filter((row) => row.dataset.base === base);
        const head = element("th", { scope: "rowgroup", colspan: this.heads.length }, base || "other");
        return members.some((row) => !row.hidden) ? [element("tr", { class: "group" }, head), ...members] : members;
      }),
    );
  }

  /** The rows that are shown, a line for each number. */
  csv() {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [["method", "column", ...Object.values(CSV)]];
    for (const row of this.table.tBodies[0].rows) {
      if (row.hidden || row.classList.contains("group")) continue;
      [...row.cells].slice(1).forEach((cell, i) => {
        const numbers = Object.keys(CSV).map((key) => cell.dataset[key] ?? "");
        const head = this.heads[i + 1].querySelector("button").textContent;
        if (numbers.some(Boolean)) lines.push([row.cells[0].textContent, head, ...numbers]);
      });
    }
    return lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  }
}

for (const panel of document.querySelectorAll("[data-panel]")) new NumberTable(panel);

// What is folded is unpacked when it is first opened.
document.addEventListener(
  "toggle",
  async ({ target }) => {
    const id = target.dataset?.fold;
    if (!id || !target.open) return;
    delete target.dataset.fold;
    target.insertAdjacentHTML("beforeend", await unpack(id));
    for (const panel of target.querySelectorAll("[data-panel]")) new NumberTable(panel);
  },
  true,
);

document.addEventListener("click", ({ target }) => {
  // an open menu closes
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(target)) menu.open = false;
});
document.addEventListener("keydown", ({ key, target }) => {
  const menu = key === "Escape" && target.closest?.(".menu[open]");
  if (menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
